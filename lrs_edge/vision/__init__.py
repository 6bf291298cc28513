"""Vision: from tiles to tokens.

Read in this order: `tiles.py` (tiles of a scene, read, encoded and remembered), `readahead.py` (the
next tile is read while one is encoded), `encoder.py` (normalising, the graph, pooling),
`positions.py` (where in the image a token lies, added to it).
"""
