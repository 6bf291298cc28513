"""Building TensorRT's engines: from the graphs of a bundle to those that its parser takes.

Needs `onnx`, which the extras `tensorrt` and `tensorrt-rtx` bring; nothing here is imported before
an engine is to be built. `stage_graphs.py` comes first: one function per stage.
"""
