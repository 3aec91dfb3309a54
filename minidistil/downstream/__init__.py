"""Fine-tuning on GLUE, IMDb and SQuAD: the heads, the data, the metrics, and distillation from a fine-tuned teacher."""
