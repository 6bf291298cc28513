"""The model bundle on disk. Nothing here runs a model.

`bundle.py` first: found, verified, read. `manifest.py` is the schema, with `layout.py` (the prompt)
and `parity.py` (what the exporter measured); `version1.py` reads older ones. A bundle is untrusted:
`limits.py` checks the manifest's numbers, `files.py` its files, `graphs.py` and `graph_shapes.py`
(with `graph_values.py` and `graph_products.py`, by `wire_format.py`) its graphs, `tokenizer.py` and
`embeddings.py` the rest.
"""
