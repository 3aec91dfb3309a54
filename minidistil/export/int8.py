"""An ONNX model with int8 weights: products of int8 numbers, word vectors stored as int8, the rest fp32.

onnxruntime's dynamic quantisation: each column of a matrix (one output of its layer) has its own scale, and what a
layer reads is quantised when it is read, by its range at that moment. The words are stored by rows, each with its own
scale, and the tied decoder of a language model uses the same rows. LayerNorm, softmax, biases and positions stay fp32,
and so do layers of a few outputs, where nothing is to be saved.

Matrices use 7 of the 8 bits (`reduce_range`): the instructions of processors without VNNI add two products of bytes in
16 bits, which all 8 bits overflow (onnxruntime's documentation of quantisation).
"""

import contextlib
import copy
import logging
import pathlib
import re
import tempfile

import numpy as np

from minidistil.errors import UserError
from minidistil.export.session import library
from minidistil.export.tidy import DECODER, WORDS, finished

FEWEST = 8  # outputs of a layer that is quantised


def group_of(name):
    """Returns the group of a layer's name, as --exclude has it: layer.0, layer.1 ... or head."""
    found = re.match(r"encoder\.blocks\.(\d+)\.", name)
    return f"layer.{found[1]}" if found else "head"


def _matrices(model):
    """Returns {name: (node, outputs)} of the products that can be quantised."""
    sizes = {each.name: each.dims for each in model.graph.initializer}
    sizes[f"{DECODER}.weight"] = sizes.get(WORDS, ())[::-1]  # which are transposed at run time
    nodes = [node for node in model.graph.node if node.op_type == "MatMul" and node.name]
    found = {node.name: (node, sizes[node.input[1]][1]) for node in nodes}
    return {name: each for name, each in found.items() if each[1] >= FEWEST}


def groups(model):
    """Returns the names that --exclude knows for a model: embeddings, layer.0 ..., and head where it is large."""
    return list(dict.fromkeys(["embeddings", *map(group_of, _matrices(model))]))


def check_groups(model, exclude):
    """Raises UserError where one of `exclude` is not among the groups of a model."""
    for name in exclude:
        if name not in groups(model):
            raise UserError(f"--exclude {name} is not part of this model: choose from {', '.join(groups(model))}")


def quantised(model, exclude=()):
    """Returns a ModelProto in int8 of an fp32 one from `to_onnx`, without the groups `exclude`, which stay fp32.

    A tied decoder in fp32 needs the fp32 words, so that they stay, too.
    """
    quantization, numpy_helper = library("onnxruntime.quantization"), library("onnx").numpy_helper
    model, matrices = copy.deepcopy(model), _matrices(model)
    kept = [name for name in matrices if group_of(name) in exclude]
    if DECODER in matrices and DECODER not in kept:  # a plain input for now, of which each word's column gets a scale
        words = next(each for each in model.graph.initializer if each.name == WORDS)
        columns = np.ascontiguousarray(numpy_helper.to_array(words).T)
        model.graph.node.remove(next(node for node in model.graph.node if f"{DECODER}.weight" in node.output))
        model.graph.initializer.append(numpy_helper.from_array(columns, f"{DECODER}.weight"))
    others = [node for node in model.graph.node if node.op_type == "MatMul" and node.name not in matrices]
    for i, node in enumerate(others):  # which are excluded by name
        node.name = node.name or f"product.{i}"
    with tempfile.TemporaryDirectory() as work, _quiet():
        library("onnx").save(model, pathlib.Path(work) / "fp32.onnx")
        quantization.quantize_dynamic(
            pathlib.Path(work) / "fp32.onnx", pathlib.Path(work) / "int8.onnx", op_types_to_quantize=["MatMul"],
            nodes_to_exclude=[*kept, *(node.name for node in others)], per_channel=True, reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
        result = library("onnx").load(pathlib.Path(work) / "int8.onnx")
    if "embeddings" not in exclude and DECODER not in kept:
        _quantise_words(result, tied=DECODER in matrices)
    return finished(result)


def _quantise_words(model, tied):
    """Replaces the word vectors (V, C) by int8 rows with a scale each, in place: those of the decoder, where `tied`."""
    onnx, graph = library("onnx"), model.graph
    weights = {each.name: each for each in graph.initializer}
    to_array, from_array = onnx.numpy_helper.to_array, onnx.numpy_helper.from_array
    if tied:
        names = [f"{DECODER}.weight_{end}" for end in ("quantized", "scale")]
        columns, scales = (to_array(weights[name]) for name in names)
        rows = np.ascontiguousarray(columns.T)
        graph.initializer.remove(weights[names[0]])
        turned = onnx.helper.make_node("Transpose", [f"{WORDS}_int8"], [names[0]], perm=[1, 0])
        graph.node.insert(0, turned)
    else:
        words = to_array(weights[WORDS])
        scales = np.maximum(np.abs(words).max(1) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        rows = np.rint(words / scales[:, None]).astype(np.int8)
    graph.initializer.append(from_array(rows, f"{WORDS}_int8"))
    graph.initializer.append(from_array(scales[:, None], f"{WORDS}_scale"))
    gather = next(node for node in graph.node if node.op_type == "Gather" and node.input[0] == WORDS)
    ids, result = gather.input[1], gather.output[0]
    parts = [
        onnx.helper.make_node("Gather", [f"{WORDS}_int8", ids], ["words_int8"]),
        onnx.helper.make_node("Cast", ["words_int8"], ["words_unscaled"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Gather", [f"{WORDS}_scale", ids], ["words_scale"]),
        onnx.helper.make_node("Mul", ["words_unscaled", "words_scale"], [result]),
    ]
    at = list(graph.node).index(gather)
    graph.node.remove(gather)
    for part in reversed(parts):
        graph.node.insert(at, part)


@contextlib.contextmanager
def _quiet():
    """Without the advice of onnxruntime's quantiser to run its own preparation, which this graph does not need."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
