"""The exported graph with our names: a product with a matrix is called as its module here, its weight likewise.

    encoder.blocks.3.attention.qkv    MatMul and, by the name with .weight, its matrix (inputs, outputs)
    decoder                           the product with the transposed word vectors, which are stored once

PyTorch's exporter names a matrix val_113, leaves some transposed at run time, and notes at each node which module it is
of, beside the lines of source code, with paths of this computer, that led to it.
"""

import ast

import numpy as np

import minidistil
from minidistil.export.session import library

WORDS, DECODER = "encoder.embeddings.words.weight", "decoder"
SCOPES = "pkg.torch.onnx.name_scopes"


def tidied(model):
    """Returns the ModelProto with named products, in which every matrix but the tied decoder's is a plain input."""
    onnx, graph = library("onnx"), model.graph
    _name_parts(graph)
    weights = {each.name: each for each in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    for node in list(graph.node):
        if node.op_type == "Gemm":
            node = _as_product(graph, node)
        if node.op_type != "MatMul":
            continue
        name, maker = node.input[1], makers.get(node.input[1])
        turned = maker is not None and maker.op_type == "Transpose" and maker.input[0] in weights
        if name not in weights and not turned:  # a product of activations
            node.name = ""
            continue
        if node.name == DECODER:
            node.input[1] = f"{DECODER}.weight"
            at = list(graph.node).index(node)
            graph.node.insert(at, onnx.helper.make_node("Transpose", [WORDS], [node.input[1]], perm=[1, 0]))
            continue
        matrix = onnx.numpy_helper.to_array(weights[maker.input[0] if turned else name])
        matrix = np.ascontiguousarray(matrix.T if turned or node.name.endswith(".turned") else matrix)
        node.name = node.name.removesuffix(".turned")
        node.input[1] = f"{node.name}.weight_in_out"
        graph.initializer.append(onnx.numpy_helper.from_array(matrix, node.input[1]))
    return finished(model)


def _name_parts(graph):
    """Names nodes and weights as modules and parameters of the model in our Graph; removes all other notes."""
    for node in graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        *_, module, _ = ["", *ast.literal_eval(notes.get(SCOPES, "['', '']"))]
        named = node.op_type in ("MatMul", "Gemm")
        node.name = (module.removeprefix("model.") or DECODER) if named else ""
        node.input[:] = [name.removeprefix("model.") for name in node.input]
        node.doc_string = ""
        del node.metadata_props[:]
    for each in graph.initializer:
        each.name = each.name.removeprefix("model.")


def _as_product(graph, node):
    """Replaces a Gemm, a product of (B, C) and perhaps its bias, by a MatMul, as for (B, T, C), and a sum."""
    helper, at = library("onnx").helper, list(graph.node).index(node)
    graph.node.remove(node)
    product = f"{node.output[0]}_product" if len(node.input) == 3 else node.output[0]
    turned = any(each.name == "transB" and each.i for each in node.attribute)
    if len(node.input) == 3:
        graph.node.insert(at, helper.make_node("Add", [product, node.input[2]], [node.output[0]]))
    graph.node.insert(at, helper.make_node("MatMul", node.input[:2], [product], node.name + ".turned" * turned))
    return graph.node[at]


def finished(model):
    """Returns the ModelProto without transposed weights and weights that no node reads, and without notes."""
    graph = model.graph
    outputs = {each.name for each in graph.output}
    used = {name for node in graph.node for name in node.input} | outputs
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.output[0] not in used]:
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input} | outputs
    kept = [each for each in graph.initializer if each.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]  # shapes of intermediate results, which a reader infers
    for part in (model, graph, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    model.producer_name, model.producer_version = "minidistil", minidistil.__version__
    return model
