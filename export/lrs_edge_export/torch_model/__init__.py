"""Every stage in plain PyTorch, defined once, for parity, calibration, distillation and training.

`tests/test_torch_model.py` holds the decoder and the CLIP tower to the modules of transformers.
Those could not stand here themselves: they hold a whole model in memory, give no hold for a packed
sequence or for observers, and the `export` extra does not install them. So what an export checks
and writes is the same on every machine, whether transformers is there or not.
"""
