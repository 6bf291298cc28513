"""Engines: each runs one graph on one device.

Read `base.py` first: what a graph, a tensor and a key/value buffer are. `devices.py` reads names
of devices, `placement.py` says which engine runs which stage, and where. `onnx.py` runs graphs with
ONNX Runtime: `onnx_kind.py` is what placement asks of it, `providers.py` sets its providers,
`node_places.py` looks where nodes really run, `runtime.py` imports it with its telemetry off,
`integer_check.py` asks it for a known answer. `tensorrt/` builds and runs engines of TensorRT.
`rows.py` puts embeddings together where a graph needs them, `metered.py` counts what graphs
compute, `cores.py` counts cores, `install.py` says what to install; the others make small graphs
and join two.
"""
