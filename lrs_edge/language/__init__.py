"""The language model: prompt and tokens in, text out.

Read in this order: `prompt.py` (the template around image and question), `sequence.py` (text and
vision tokens in one row, with positions), `kv_cache.py` (what is remembered, and how it is pruned),
`decoder.py` (running a graph over the cache), `sampling.py` (the next token), `llm.py` (prefill and
generation).
"""
