"""A model as an ONNX file, which a phone, a browser or a C++ program runs, and whether that file is as good as ours.

    graphs.py    each kind of model as a graph, with the inputs and outputs that the Hub's files have
    tidy.py      the exported graph with our names of layers
    int8.py      the same with int8 weights
    session.py   runs a file with onnxruntime
    held_out.py  the items on which both are compared, and their score
    gate.py      differences, agreement, score, latency
    blame.py     which layers cost most, where an int8 file loses too much

Only here are onnx, onnxscript and onnxruntime imported (requirements-export.txt).
"""
