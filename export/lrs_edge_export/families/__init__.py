"""Checkpoint families: each reads one kind of checkpoint into the canonical three stages.

`registry.py` lists all families and chooses one, `family.py` says what each declares,
`refusals.py` why others are not taken. `parts.py` has what all readers share, `decoder_fields.py`
the config fields that change what a decoder computes, `recipes.py` what is known about released
checkpoints. `llava.py` holds what the authors' `llava_qwen.py` and `llava_llama.py` share,
`nano.py` reads the embedded model.
"""
