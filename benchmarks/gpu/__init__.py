"""What a card makes of a model of 7B's width, beside PyTorch and the card's own limits.

See `__main__.py`. Never run on a card yet: on a CPU with small sizes, where the tests run it.
"""
