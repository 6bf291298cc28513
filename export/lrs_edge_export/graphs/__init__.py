"""ONNX graphs written node by node, their weights streamed to external data."""
