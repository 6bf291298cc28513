"""Checkpoint families: each reads one kind of checkpoint into the canonical three stages.

`registry.py` chooses the reader. `llava.py` holds what `llava_qwen.py` and `llava_llama.py` share,
`nano.py` reads the embedded model, `decoder_fields.py` the config fields that change what a decoder
computes, `recipes.py` what is known about released checkpoints.
"""
