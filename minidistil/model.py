"""BERT, GPT-2 and their kin in one file: transformer blocks and a language-model head that shares the word vectors.

    BERT        Devlin et al. 2018, arXiv 1810.04805
    DistilBERT  Sanh et al. 2019, arXiv 1910.01108: half the layers, no token types, no pooler
    RoBERTa     Liu et al. 2019, arXiv 1907.11692: BERT on more text; XLM-R, arXiv 1911.02116: of a hundred languages
    GPT-2       Radford et al. 2019: a token sees those before it only, and LayerNorm comes before each half of a block

All have one `Config`, which names the family; `causal` is what computes differently. What differs in files only is in
families.py. There is no pooler and no next-sentence head, because distilling a language model uses neither.

Every dropout has a number, its `site`: 0 after the embeddings, then three in each layer. What it drops follows from the
`key` of the forward pass, which says the seed and which sequences of the update these are (kernels/dropout.py).

Legend:  B batch   T tokens per sequence   N gathered rows   C width   H heads   D = C/H head width
         F MLP width   L layers   V vocabulary
"""

import dataclasses
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.dropout import Key, dropout, flash_dropout
from kernels.layer_norm import dropout_add_layer_norm


@dataclasses.dataclass(frozen=True)
class Config:
    """The family and shape of a model; the defaults are bert-base-uncased."""

    vocab_size: int = 30522
    positions: int = 512  # longest sequence
    token_types: int = 2  # 0: none
    layers: int = 12
    heads: int = 12
    width: int = 768  # C
    mlp_width: int = 3072  # F
    dropout: float = 0.1  # after embeddings, attention output and MLP
    attention_dropout: float = 0.1  # on attention probabilities
    norm_eps: float = 1e-12
    init_range: float = 0.02  # standard deviation of initial weights
    pad_id: int = 0
    family: str = "bert"  # a key of families.FAMILIES

    def __post_init__(self):
        for name in ("vocab_size", "positions", "layers", "heads", "width", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")

    @property
    def causal(self):
        """Whether the model predicts the next token: none sees a later one, and LayerNorm comes first, as in GPT-2."""
        return self.family == "gpt2"

    def has_type(self, i):
        return i < self.token_types or not self.token_types  # without types, all are ignored

    def student(self, layers):
        """Returns the student's shape for this teacher: `layers` layers, all else equal; of a BERT a DistilBERT.

        transformers' DistilBERT has one `norm_eps`: with another, it is a BERT of so many layers, which computes the
        same there as here.
        """
        if self.family not in ("bert", "distilbert") or self.norm_eps != Config.norm_eps:
            return dataclasses.replace(self, layers=layers)
        return dataclasses.replace(self, layers=layers, token_types=0, family="distilbert")


BERT_BASE = Config()
DISTILBERT_BASE = BERT_BASE.student(6)


class Embeddings(nn.Module):
    """Word + position (+ token type) vectors, then LayerNorm and dropout, which in GPT-2 the first block does."""

    def __init__(self, config):
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.types = nn.Embedding(config.token_types, config.width) if config.token_types else None
        self.tied = False  # whether a decoder shares the word vectors
        self.norm = None
        if not config.causal:
            self.norm, self.dropout = nn.LayerNorm(config.width, config.norm_eps), config.dropout

    def forward(self, ids, types=None, key=None):
        T = ids.shape[1]
        if T > self.positions.num_embeddings:
            raise ValueError(f"sequence of {T} tokens, but the model has {self.positions.num_embeddings} positions")
        # tied weights: the decoder's gradient is a (V, C) table already, and a sparse gradient of the embedding adds
        # its few rows to it without a second table; CPU only: on a GPU the host would wait for the number of rows
        sparse = self.tied and not ids.is_cuda and not torch.compiler.is_compiling()
        x = F.embedding(ids, self.words.weight, sparse=sparse)  # (B, T, C)
        if self.types is not None:
            # before the positions, for the same bits as transformers; a single segment is all type 0
            x = x + (self.types.weight[0] if types is None else self.types(types))
        x = x + self.positions.weight[:T]
        if self.norm is None:
            return x
        x = dropout_add_layer_norm(x, None, self.norm.weight, self.norm.bias, self.norm.eps)
        return dropout(x, self.dropout, self.training, key, site=0)


def attention_ref(q, k, v, mask=None, p=0.0, key=None, site=0, causal=False):
    """softmax(q k^T / sqrt(D)) v for q, k, v of shape (B, H, T, D).

    mask (B, 1, 1, T) is True where a key may be seen; `causal`, without a mask: query i sees keys 0 to i. `p` drops
    probabilities. The definition of `scaled_dot_product_attention`, which does not store (B, H, T, T).
    Source: Vaswani et al. 2017, section 3.2.1.
    """
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)  # (B, H, T, T)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return dropout(torch.softmax(scores, dim=-1), p, True, key, site) @ v  # (B, H, T, D)


# All of PyTorch's GPU backends except cuDNN, which PyTorch prefers on an H100: cuDNN may round a dropout probability to
# sixteenths and still scale for the exact one (pytorch#174245), and its masked backward pass can give NaN (#196678).
GPU_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(q, k, v, mask=None, p=0.0, key=None, site=0, causal=False):
    """`attention_ref` by the fastest backend: on a GPU flash attention, or memory-efficient attention with a mask."""
    if q.is_cuda:
        with sdpa_kernel(GPU_ATTENTION), flash_dropout(q, k, v, mask, p, key, site, causal):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal)
    # on a CPU PyTorch's dropout is slower, and so is its attention in bf16; exported, it is six operators more a layer
    if p or q.dtype == torch.bfloat16 or torch.compiler.is_exporting():
        return attention_ref(q, k, v, mask, p, key, site, causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class Attention(nn.Module):
    """Multi-head self-attention; one matrix product computes q, k and v."""

    def __init__(self, config, site):
        super().__init__()
        self.heads, self.causal = config.heads, config.causal
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.dropout, self.site = config.attention_dropout, site

    def forward(self, x, mask=None, first=None, key=None):
        """(B, T, C) -> (B, T, C), or (B, first, C): the rows of the first tokens only."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)
        # the gradient of unbind is one stack; that of a permutation would copy q, k and v once more
        q, k, v = (z.transpose(1, 2) for z in qkv.unbind(2))  # each (B, H, T, D)
        p = self.dropout if self.training else 0.0
        y = attention(q[:, :, :first], k, v, mask, p, key, self.site, self.causal)
        return self.out(y.transpose(1, 2).reshape(B, -1, C))


class MLP(nn.Module):
    """C -> F -> C with BERT's exact (erf) GELU, or GPT-2's tanh approximation, which differs by at most 5e-4."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)
        self.gelu = "tanh" if config.causal else "none"

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate=self.gelu))


class Block(nn.Module):
    """Attention, then the MLP, each added to what it read: x + dropout(f(x)).

    Post-norm, as in BERT: LayerNorm follows each sum. Pre-norm, as in GPT-2 and later: f reads LayerNorm(x). A kernel
    computes dropout, sum and LayerNorm together, so a pre-norm block begins with the sum of what is before it.
    """

    def __init__(self, config, site):
        super().__init__()
        self.attention = Attention(config, site)
        self.attention_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)
        self.mlp_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.dropout, self.site = config.dropout, site

    def forward(self, x, mask=None, first=None, key=None):
        x = self.dropout_add_norm(self.attention(x, mask, first, key), x[:, :first], self.attention_norm, key, 1)
        return self.dropout_add_norm(self.mlp(x), x, self.mlp_norm, key, 2)

    def pre_norm(self, x, z, key=None):
        """(x, z) -> (x, z), (B, T, C): the residual stream is z + dropout(x); the first block's z is None."""
        x, z = self.dropout_add_norm(x, z, self.attention_norm, key, -1, True)
        x, z = self.dropout_add_norm(self.attention(x, key=key), z, self.mlp_norm, key, 1, True)
        return self.mlp(x), z

    def dropout_add_norm(self, x, residual, norm, key, place, with_sum=False):
        affine, dropping = (norm.weight, norm.bias, norm.eps), (self.dropout, self.training, key, self.site + place)
        return dropout_add_layer_norm(x, residual, *affine, *dropping, with_sum)


class Encoder(nn.Module):
    """Token ids (B, T) int64 -> hidden states (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config, site=1 + 3 * i) for i in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps) if config.causal else None

    def forward(self, ids, mask=None, types=None, first=None, key=None):
        """mask (B, T) bool is True at real tokens; None: no padding, as in packed training.

        With `first` 1 the result is that of [CLS] only, (B, 1, C): the last block does not compute the other rows. A
        causal model needs no mask where padding is on the right, which no real token sees. Without a `key` the seed of
        dropout comes from PyTorch's generator, and the batch is an update of its own.
        """
        if key is None and self.training:
            key = Key.drawn(ids.device)
        x = self.embeddings(ids, types, key)
        if self.config.causal:
            z = None
            for block in self.blocks:
                x, z = block.pre_norm(x, z, key)
            return block.dropout_add_norm(x, z, self.norm, key, 2)
        mask = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, T), broadcast over heads and queries
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, mask, key=key)
        return last(x, mask, first, key)


class Head(nn.Module):
    """The masked-LM head up to the vocabulary: dense + GELU + LayerNorm on (N, C), and the decoder's bias (V)."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x):
        return dropout_add_layer_norm(F.gelu(self.dense(x)), None, self.norm.weight, self.norm.bias, self.norm.eps)


class LanguageModel(nn.Module):
    """An encoder with its language-model head, whose decoder weight *is* the word-embedding table.

    `forward` returns hidden states. Logits cost V numbers per row (122 kB in fp32), so a caller first gathers the rows
    to score, then passes `head(rows)` and `decoder` to the loss.
    """

    def __init__(self, config, seed=None):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.head = nn.Identity() if config.causal else Head(config)
        self.words = config.vocab_size  # that are scored; `checks.score_words` leaves out rows without a word
        self.encoder.embeddings.tied = True
        initialise(self, config.init_range, seed)

    def forward(self, ids, mask=None, types=None, key=None):
        return self.encoder(ids, mask, types, key=key)

    @property
    def decoder(self):
        """(weight (V, C), bias (V)) of the vocabulary projection, V the words that are scored; GPT-2's bias is 0."""
        weight = self.encoder.embeddings.words.weight
        bias = weight.new_zeros(len(weight)) if self.config.causal else self.head.bias
        # no slice of the whole, whose backward pass would copy the gradient
        return (weight, bias) if self.words == len(bias) else (weight[: self.words], bias[: self.words])

    def logits(self, rows):
        """Vocabulary logits (N, V) of hidden rows (N, C): for evaluation and sampling, not for training."""
        return F.linear(self.head(rows), *self.decoder)


def initialise(model, std, seed=None):
    """Initialises weights: normal(0, std) for matrices, zero for biases, one for LayerNorm weights."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)


def num_params(config):
    """Number of parameters, the tied decoder counted once: 109,514,298 for BERT-base, 66,985,530 for DistilBERT.

    124,439,808 for GPT-2, and 81,912,576 for DistilGPT2.
    """
    C, F_, V = config.width, config.mlp_width, config.vocab_size
    embeddings = (V + config.positions + config.token_types + 2) * C  # with a LayerNorm, which GPT-2 has at the end
    block = 4 * (C * C + C) + (C * F_ + F_) + (F_ * C + C) + 2 * 2 * C
    head = 0 if config.causal else C * C + C + 2 * C + V
    return embeddings + config.layers * block + head
