"""Runs an ONNX file with onnxruntime, on a CPU."""

import importlib

import numpy as np
import torch

from minidistil.errors import UserError


def library(name):
    """Returns the module of this name, or raises UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        way = "pip install -r requirements-export.txt"
        raise UserError(f"{error.name or name} is not installed, which ONNX files need: {way}") from None


class Session:
    """(ids, mask, types), each (B, T), mask and types perhaps None -> a list of fp32 tensors, one per output.

    data: the bytes of an ONNX file, or its path. threads: of the computation.
    """

    def __init__(self, data, threads=1):
        onnxruntime = library("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        source = data if isinstance(data, bytes) else str(data)
        self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.inputs = {each.name: each.shape for each in self.session.get_inputs()}
        # what a causal model keeps of a text is asked for by those who go on with it
        self.outputs = [each.name for each in self.session.get_outputs() if not each.name.startswith("present")]

    def __call__(self, ids, mask=None, types=None):
        B, T = ids.shape
        given = {
            "input_ids": ids.numpy(),
            "attention_mask": np.ones((B, T), np.int64) if mask is None else mask.numpy().astype(np.int64),
            "token_type_ids": np.zeros((B, T), np.int64) if types is None else types.numpy(),
            "position_ids": np.broadcast_to(np.arange(T), (B, T)),
        }
        for name, shape in self.inputs.items():
            if name not in given:  # keys or values of earlier tokens, of which there are none
                given[name] = np.zeros((B, shape[1], 0, shape[3]), np.float32)
        results = self.session.run(self.outputs, {name: given[name] for name in self.inputs})
        return [torch.from_numpy(result) for result in results]
