"""What differs between model families: keys of config.json, tensor names, and fine-tuning heads.

Each family has one table, and `Config.family` names it. A new family also needs its tokenizer's files
(tokenizer_files.py) and, where it computes something else, model.py.
Source: transformers' BertConfig, DistilBertConfig and their models, arXiv 1810.04805 and 1910.01108.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    """One family, as its checkpoints on the Hugging Face Hub are."""

    architecture: str  # prefix of the class names in transformers
    config_keys: dict  # field of Config -> key of config.json
    config_only: tuple  # like SUPPORTED below, for this family
    config_constants: dict  # other keys to write, which describe our model in transformers' terms
    tensors: dict  # our module -> theirs; `query|key|value`: one matrix of ours is three of theirs, in this order
    tied: tuple  # (name of a copy in some files, name of the tensor that it must equal)
    head_activation: str  # of the classifier's dense layer on [CLS]
    classifier_dropout: float | None  # None: the encoder's
    span_dropout: float
    keeps_pooler: bool  # whether a new classifier starts from the checkpoint's `pool`: BERT's pooler is trained


BERT = Family(
    architecture="Bert",
    config_keys={
        "vocab_size": "vocab_size", "positions": "max_position_embeddings",
        "layers": "num_hidden_layers", "heads": "num_attention_heads",
        "width": "hidden_size", "mlp_width": "intermediate_size", "token_types": "type_vocab_size",
        "dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob",
        "norm_eps": "layer_norm_eps", "init_range": "initializer_range", "pad_id": "pad_token_id",
    },
    config_only=(),
    config_constants={
        "hidden_act": "gelu", "position_embedding_type": "absolute", "classifier_dropout": None, "use_cache": True,
    },
    tensors={
        "encoder.embeddings.words": "bert.embeddings.word_embeddings",
        "encoder.embeddings.positions": "bert.embeddings.position_embeddings",
        "encoder.embeddings.types": "bert.embeddings.token_type_embeddings",
        "encoder.embeddings.norm": "bert.embeddings.LayerNorm",
        "encoder.blocks.{i}.attention.qkv": "bert.encoder.layer.{i}.attention.self.query|key|value",
        "encoder.blocks.{i}.attention.out": "bert.encoder.layer.{i}.attention.output.dense",
        "encoder.blocks.{i}.attention_norm": "bert.encoder.layer.{i}.attention.output.LayerNorm",
        "encoder.blocks.{i}.mlp.up": "bert.encoder.layer.{i}.intermediate.dense",
        "encoder.blocks.{i}.mlp.down": "bert.encoder.layer.{i}.output.dense",
        "encoder.blocks.{i}.mlp_norm": "bert.encoder.layer.{i}.output.LayerNorm",
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions",
        "pool": "bert.pooler.dense",
        "classify": "classifier",
        "answer": "qa_outputs",
    },
    tied=(
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
    head_activation="tanh",
    classifier_dropout=None,
    span_dropout=0.0,
    keeps_pooler=True,
)  # fmt: skip

DISTILBERT = Family(
    architecture="DistilBert",
    config_keys={
        "vocab_size": "vocab_size", "positions": "max_position_embeddings",
        "layers": "n_layers", "heads": "n_heads", "width": "dim", "mlp_width": "hidden_dim",
        "dropout": "dropout", "attention_dropout": "attention_dropout",
        "init_range": "initializer_range", "pad_id": "pad_token_id",
    },
    config_only=(("layer_norm_eps", 1e-12),),  # transformers reads no other, and would compute something else
    config_constants={
        "activation": "gelu", "qa_dropout": 0.1, "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False,
        "tie_weights_": True,
    },
    tensors={
        "encoder.embeddings.words": "distilbert.embeddings.word_embeddings",
        "encoder.embeddings.positions": "distilbert.embeddings.position_embeddings",
        "encoder.embeddings.norm": "distilbert.embeddings.LayerNorm",
        "encoder.blocks.{i}.attention.qkv": "distilbert.transformer.layer.{i}.attention.q_lin|k_lin|v_lin",
        "encoder.blocks.{i}.attention.out": "distilbert.transformer.layer.{i}.attention.out_lin",
        "encoder.blocks.{i}.attention_norm": "distilbert.transformer.layer.{i}.sa_layer_norm",
        "encoder.blocks.{i}.mlp.up": "distilbert.transformer.layer.{i}.ffn.lin1",
        "encoder.blocks.{i}.mlp.down": "distilbert.transformer.layer.{i}.ffn.lin2",
        "encoder.blocks.{i}.mlp_norm": "distilbert.transformer.layer.{i}.output_layer_norm",
        "head.dense": "vocab_transform",
        "head.norm": "vocab_layer_norm",
        "head": "vocab_projector",
        "pool": "pre_classifier",
        "classify": "classifier",
        "answer": "qa_outputs",
    },
    tied=(("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),),
    head_activation="relu",
    classifier_dropout=0.2,
    span_dropout=0.1,
    keeps_pooler=False,
)  # fmt: skip

FAMILIES = {"bert": BERT, "distilbert": DISTILBERT}

# keys of config.json that change what a model computes, and the supported values of each, which mean the same
SUPPORTED = (
    ("hidden_act", "gelu", "gelu_python"),  # with the error function; gelu_new, gelu_pytorch_tanh ... approximate it
    ("activation", "gelu", "gelu_python"),
    ("position_embedding_type", "absolute"),
    ("is_decoder", False),
    ("add_cross_attention", False),
)
# parts of a tensor's name that only say where its module was kept; no module has a name of its own among them
WRAPPERS = {
    "bert", "distilbert",  # the encoder, in a model with a head
    "model", "auto_model",  # the whole model, in a user's own class, Lightning's or sentence-transformers'
    "module", "_module", "_orig_mod",  # DataParallel and its kin, Opacus, torch.compile
    "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",  # Lightning, FSDP, checkpointing
}  # fmt: skip
# tensors of a file that the wanted head does not use, and what they are
IGNORED = [
    (r"embeddings\.(position|token_type)_ids", "the constants 0, 1, 2, ... and 0, 0, 0, ..."),
    (r"fit_dense(s\.\d+)?\.(weight|bias)", "TinyBERT's projections to its teacher's width, used in its training only"),
    (r"pooler\.dense\.(weight|bias)", "read by sentence-level heads only"),
    (r"cls\.seq_relationship\.(weight|bias)", "the next-sentence head"),
    (r"(pre_classifier|classifier|qa_outputs)\.(weight|bias)", "the head of a fine-tuned task"),
    (r"cls\.predictions\.(transform\.(dense|LayerNorm)\.(weight|bias)|(decoder\.)?bias)", "BERT's masked-LM head"),
    (r"vocab_(transform|layer_norm|projector)\.(weight|bias)", "DistilBERT's masked-LM head"),
]
