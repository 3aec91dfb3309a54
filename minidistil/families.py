"""What differs between model families: keys of config.json, tensor names, and fine-tuning heads.

Each family has one table, and `Config.family` names it. A new family also needs its tokenizer (tokenizers/) and, where
it computes something else, model.py.
Source: transformers' BertConfig, DistilBertConfig, RobertaConfig, XLMRobertaConfig, GPT2Config and their models.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    """One family, as its checkpoints on the Hugging Face Hub are."""

    architecture: str  # prefix of the class names in transformers
    language_model: str  # suffix of that of the language model
    config_keys: dict  # field of Config -> key of config.json
    config_only: tuple  # like SUPPORTED below, for this family
    config_defaults: dict  # field of Config -> its value where the key is absent, unless it is that of Config
    config_constants: dict  # other keys to write, which describe our model in transformers' terms
    tensors: dict  # our module -> theirs; `query|key|value`: one matrix of ours is three of theirs, in this order
    transposed: str  # pattern of the names of matrices that files hold as (inputs, outputs)
    first_position: bool  # whether the first token's position is pad_id + 1: files hold rows that no token uses
    tied: tuple  # (name of a copy in some files, name of the tensor that it must equal)
    head_activation: str | None  # of the classifier's dense layer on [CLS]; None: there is no classifier
    classifier_dropout: float | None  # None: the encoder's
    drops_cls: bool  # whether the classifier drops out of [CLS] itself, too
    span_dropout: float
    keeps_pooler: bool  # whether a new classifier starts from the checkpoint's `pool`: BERT's pooler is trained


NONE = r"(?!)"  # matches nothing

BERT = Family(
    architecture="Bert",
    language_model="ForMaskedLM",
    config_keys={
        "vocab_size": "vocab_size", "positions": "max_position_embeddings",
        "layers": "num_hidden_layers", "heads": "num_attention_heads",
        "width": "hidden_size", "mlp_width": "intermediate_size", "token_types": "type_vocab_size",
        "dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob",
        "norm_eps": "layer_norm_eps", "init_range": "initializer_range", "pad_id": "pad_token_id",
    },
    config_only=(),
    config_defaults={},
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
    transposed=NONE,
    first_position=False,
    tied=(
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
    head_activation="tanh",
    classifier_dropout=None,
    drops_cls=False,
    span_dropout=0.0,
    keeps_pooler=True,
)  # fmt: skip

DISTILBERT = Family(
    architecture="DistilBert",
    language_model="ForMaskedLM",
    config_keys={
        "vocab_size": "vocab_size", "positions": "max_position_embeddings",
        "layers": "n_layers", "heads": "n_heads", "width": "dim", "mlp_width": "hidden_dim",
        "dropout": "dropout", "attention_dropout": "attention_dropout",
        "init_range": "initializer_range", "pad_id": "pad_token_id",
    },
    config_only=(("layer_norm_eps", 1e-12),),  # transformers reads no other, and would compute something else
    config_defaults={"token_types": 0},
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
    transposed=NONE,
    first_position=False,
    tied=(("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),),
    head_activation="relu",
    classifier_dropout=0.2,
    drops_cls=False,
    span_dropout=0.1,
    keeps_pooler=False,
)  # fmt: skip

ROBERTA = dataclasses.replace(
    BERT,
    architecture="Roberta",
    config_defaults={"pad_id": 1},
    tensors={
        **{ours: theirs.replace("bert.", "roberta.", 1) for ours, theirs in BERT.tensors.items()},
        "head.dense": "lm_head.dense",
        "head.norm": "lm_head.layer_norm",
        "head": "lm_head",
        "pool": "classifier.dense",
        "classify": "classifier.out_proj",
    },
    first_position=True,
    drops_cls=True,
    tied=(
        ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        ("lm_head.decoder.bias", "lm_head.bias"),
    ),
    keeps_pooler=False,
)

GPT2 = Family(
    architecture="GPT2",
    language_model="LMHeadModel",
    config_keys={
        "vocab_size": "vocab_size", "positions": "n_positions",
        "layers": "n_layer", "heads": "n_head", "width": "n_embd", "mlp_width": "n_inner",
        "dropout": "resid_pdrop", "attention_dropout": "attn_pdrop",
        "norm_eps": "layer_norm_epsilon", "init_range": "initializer_range",
    },
    config_only=(
        ("activation_function", "gelu_new", "gelu_pytorch_tanh"),
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
    ),
    config_defaults={"token_types": 0, "norm_eps": 1e-5},
    config_constants={"activation_function": "gelu_new", "use_cache": True},
    tensors={
        "encoder.embeddings.words": "transformer.wte",
        "encoder.embeddings.positions": "transformer.wpe",
        "encoder.blocks.{i}.attention_norm": "transformer.h.{i}.ln_1",
        "encoder.blocks.{i}.attention.qkv": "transformer.h.{i}.attn.c_attn",
        "encoder.blocks.{i}.attention.out": "transformer.h.{i}.attn.c_proj",
        "encoder.blocks.{i}.mlp_norm": "transformer.h.{i}.ln_2",
        "encoder.blocks.{i}.mlp.up": "transformer.h.{i}.mlp.c_fc",
        "encoder.blocks.{i}.mlp.down": "transformer.h.{i}.mlp.c_proj",
        "encoder.norm": "transformer.ln_f",
    },
    transposed=r"\.c_(attn|proj|fc)\.weight$",
    first_position=False,
    tied=(("lm_head.weight", "transformer.wte.weight"),),
    head_activation=None,
    classifier_dropout=None,
    drops_cls=False,
    span_dropout=0.0,
    keeps_pooler=False,
)  # fmt: skip

FAMILIES = {
    "bert": BERT,
    "distilbert": DISTILBERT,
    "roberta": ROBERTA,
    "xlm-roberta": dataclasses.replace(ROBERTA, architecture="XLMRoberta"),
    "gpt2": GPT2,
}

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
    "bert", "distilbert", "roberta", "transformer",  # the encoder, in a model with a head
    "model", "auto_model",  # the whole model, in a user's own class, Lightning's or sentence-transformers'
    "module", "_module", "_orig_mod",  # DataParallel and its kin, Opacus, torch.compile
    "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",  # Lightning, FSDP, checkpointing
}  # fmt: skip
# tensors of a file that the wanted head does not use, and what they are; first those of tasks
OF_TASKS = [
    (r"pooler\.dense\.(weight|bias)", "read by sentence-level heads only"),
    (r"cls\.seq_relationship\.(weight|bias)", "the next-sentence head"),
    (r"(pre_classifier|classifier|qa_outputs)\.((dense|out_proj)\.)?(weight|bias)", "the head of a fine-tuned task"),
]
IGNORED = [
    *OF_TASKS,
    (r"embeddings\.(position|token_type)_ids", "the constants 0, 1, 2, ... and 0, 0, 0, ..."),
    (r"fit_dense(s\.\d+)?\.(weight|bias)", "TinyBERT's projections to its teacher's width, used in its training only"),
    (r"h\.\d+\.attn\.(masked_)?bias", "GPT-2's causal mask, and the score of what it hides"),
    (r"lm_head\.(dense\.|layer_norm\.|decoder\.)?(weight|bias)", "RoBERTa's masked-LM head"),
    (r"cls\.predictions\.(transform\.(dense|LayerNorm)\.(weight|bias)|(decoder\.)?bias)", "BERT's masked-LM head"),
    (r"vocab_(transform|layer_norm|projector)\.(weight|bias)", "DistilBERT's masked-LM head"),
]
