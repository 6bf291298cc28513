"""Engines: each runs one graph on one device.

Read `base.py` first: what a graph, a tensor and a key/value buffer are. `placement.py` says which
engine runs which stage, and where; `onnx.py` is the engine there is; `metered.py` counts what
graphs compute. `runtime.py` imports onnxruntime with its telemetry off, `integer_check.py` asks it
for a known answer, `cores.py` counts cores, `gather_model.py` and `one_node_model.py` make its
smallest graphs.
"""
