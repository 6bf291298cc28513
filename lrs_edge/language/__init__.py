"""The language model: prompt and tokens in, text out.

Read in this order: `prompt.py` (text to token ids and back), `layout.py` (the one builder of
sequences, from the layout that the manifest holds), `local_plan.py` (where a level's tokens stand)
and `sequence.py` (the rows of tokens it makes), `kv_cache.py` (what is remembered, and how it is
pruned), `layers.py` and `decoder.py` (running a graph over the cache: once, and over a prompt),
`sampling.py` (the next token), `llm.py` (prefill and generation).
"""
