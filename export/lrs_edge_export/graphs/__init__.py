"""ONNX graphs written node by node, their weights streamed to external data.

`onnx_writer.py` and `weight_file.py` write nodes and weights, `block_layout.py` lays out blocks of
integers; `vision_graph.py` and `decoder_graph.py` (of the parts in `decoder_builder.py`) are the
graphs; `layer_graphs.py` cuts single layers out for checks, `sessions.py` runs graphs for checks,
`flops.py` counts operations.
"""
