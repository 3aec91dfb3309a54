"""Each kind of model as a graph: inputs and outputs have the names and shapes of the ONNX files on the Hub.

    MaskedWords   logits (B, T, V)
    NextTokens    logits (B, T, V), and the keys and values of each layer, which the next call is given
    Labels        logits (B, K)
    Spans         start_logits (B, T), end_logits (B, T)
    Vectors       last_hidden_state (B, T, C): the reader of the file pools, as 1_Pooling says

Inputs are input_ids and attention_mask (B, T) int64, 1 at real tokens, and token_type_ids where a BERT has types.
PyTorch's exporter traces these modules (dynamo=True: the older one is deprecated since PyTorch 2.9, and unrolls what
depends on T). Opset 18 is the exporter's own; onnxruntime reads it since 1.14, so older phones do, too.

Legend:  B batch   T tokens   P tokens of earlier calls   C width   H heads   D = C/H   K labels   V vocabulary
"""

import logging
import pathlib
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from minidistil import weights
from minidistil.downstream.heads import Classifier, SpanReader, load_finetuned
from minidistil.errors import UserError
from minidistil.export.session import library
from minidistil.export.tidy import tidied
from minidistil.model import attention_ref
from minidistil.pooling import Pooling, SentenceEncoder, modules_folder, read_pooling

OPSET = 18
LIMIT = 2 * 10**9  # bytes of weights in one file: a protocol buffer ends at 2 GiB


def seen(mask):
    """Returns the mask (B, T) of a file as ours has it; None, where our model runs without one, stays None."""
    return None if mask is None else mask.bool()


class Graph(nn.Module):
    """A `model` of ours as a graph of inputs `input_ids`, `attention_mask` and perhaps `token_type_ids`."""

    outputs = ("logits",)

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model.eval().requires_grad_(False), model.config
        typed = self.config.family == "bert" and model.encoder.embeddings.types is not None
        self.inputs = ("input_ids", "attention_mask", *["token_type_ids"] * typed)

    def forward(self, input_ids, attention_mask, types=None):
        return self.model(input_ids, seen(attention_mask), types)

    def ours(self, ids, mask, types):
        """Returns what our model, as it is, computes of a batch: one tensor per output."""
        outputs = self(ids, mask, types if "token_type_ids" in self.inputs else None)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def example(self):
        """Returns (inputs, dynamic_shapes) to trace with; sizes are unlike each other, and none is 1."""
        ids = torch.full((2, min(6, self.config.positions)), min(5, self.config.vocab_size - 1))
        axes = {
            0: torch.export.Dim("batch_size", min=1),
            1: torch.export.Dim("sequence_length", min=2, max=self.config.positions),
        }
        inputs = (ids, torch.ones_like(ids), torch.zeros_like(ids))[: len(self.inputs)]
        return inputs, (axes,) * len(inputs)


class MaskedWords(Graph):
    kind = "masked-LM"

    def forward(self, input_ids, attention_mask, types=None):
        return self.model.logits(self.model(input_ids, seen(attention_mask), types))


class Labels(Graph):
    kind = "classification"


class Spans(Graph):
    kind, outputs = "question answering", ("start_logits", "end_logits")

    def forward(self, input_ids, attention_mask, types=None):
        return self.model(input_ids, seen(attention_mask), types).unbind(1)


class Vectors(Graph):
    kind, outputs, pooling = "sentence vectors", ("last_hidden_state",), Pooling()


class NextTokens(Graph):
    """A GPT-2 that keeps keys and values: each call reads the new tokens only, of P + T so far.

    attention_mask (B, P + T); position_ids (B, T); past_key_values.{layer}.key and .value (B, H, P, D), P 0 at first.
    The readers of such files give a model without these inputs one token a call, which alone would mean something else.
    """

    kind = "causal LM"

    def __init__(self, model):
        super().__init__(model)
        layers = range(self.config.layers)
        kept = [f"{i}.{part}" for i in layers for part in ("key", "value")]
        self.inputs = ("input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in kept))
        self.outputs = ("logits", *(f"present.{name}" for name in kept))

    def forward(self, input_ids, attention_mask, position_ids, past):
        encoder, (B, T), new = self.model.encoder, input_ids.shape, []
        x = F.embedding(input_ids, encoder.embeddings.words.weight)
        x = x + F.embedding(position_ids, encoder.embeddings.positions.weight)  # (B, T, C)
        places = torch.arange(past[0].shape[2] + T)
        visible = (places <= places[-T:, None]) & seen(attention_mask)[:, None, None]  # (B, 1, T, P + T)
        for block, earlier in zip(encoder.blocks, zip(past[::2], past[1::2], strict=True), strict=True):
            attention = block.attention
            qkv = attention.qkv(block.attention_norm(x)).view(B, T, 3, attention.heads, -1)
            q, *kv = (z.transpose(1, 2) for z in qkv.unbind(2))  # each (B, H, T, D)
            k, v = (torch.cat(pair, 2) for pair in zip(earlier, kv, strict=True))  # (B, H, P + T, D)
            new += k, v
            x = x + attention.out(attention_ref(q, k, v, visible).transpose(1, 2).reshape(B, T, -1))
            x = x + block.mlp(block.mlp_norm(x))
        return self.model.logits(encoder.norm(x)), *new

    def ours(self, ids, mask, types):
        return (self.model.logits(self.model(ids)),)

    def example(self):
        H, D, P = self.config.heads, self.config.width // self.config.heads, 3
        ids = torch.full((2, 5), min(5, self.config.vocab_size - 1))
        past = [torch.zeros(2, H, P, D) for _ in range(2 * self.config.layers)]
        B, T, P = "batch_size", "sequence_length", "past_sequence_length"
        axes = {0: B, 1: T}, {0: B, 1: "total_sequence_length"}, {0: B, 1: T}, [{0: B, 2: P}] * len(past)
        places = torch.arange(5).expand(2, 5).contiguous()
        return (ids, torch.ones(2, 8, dtype=torch.int64), places, past), axes


def open_graph(folder):
    """Returns the Graph of the model in a folder, by its config.json and modules.json; UserError for others."""
    folder = pathlib.Path(folder)
    config = weights.read_config(folder)
    architecture = str((weights.read_json(folder / "config.json").get("architectures") or [""])[0])
    if config.causal:
        return NextTokens(weights.load_model(folder))
    if architecture.endswith((Classifier.hub_name, SpanReader.hub_name)):
        model, labels = load_finetuned(folder)
        graph = (Labels if isinstance(model, Classifier) else Spans)(model)
        graph.labels = labels
        return graph
    if modules_folder(folder) is not None or architecture.endswith("Model"):
        graph = Vectors(weights.load_model(folder, kind=SentenceEncoder))
        graph.pooling = read_pooling(folder)
        return graph
    return MaskedWords(weights.load_model(folder))


def to_onnx(graph):
    """Returns an onnx.ModelProto of a Graph, its weights inside, and layers named as ours; UserError if too large."""
    size = sum(p.nbytes for p in graph.parameters())
    if size > LIMIT:
        raise UserError(f"the model has {size / 1e9:.1f} GB of weights, and one ONNX file holds 2: use a smaller one")
    library("onnxscript")
    inputs, axes = graph.example()
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it says that torchvision, which nothing here uses, is not installed
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of PyTorch to its own modules
            program = torch.onnx.export(
                graph, inputs, dynamo=True, opset_version=OPSET, dynamic_shapes=axes, input_names=graph.inputs,
                output_names=graph.outputs, verbose=False,
            )  # fmt: skip
    finally:
        quiet.setLevel(level)
    return tidied(program.model_proto)
