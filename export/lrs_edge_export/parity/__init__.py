"""Whether engines still say what the checkpoint said: PyTorch as the reference, figures, limits."""
