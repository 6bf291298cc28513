"""Which tiles are looked at, and which tokens matter for a question.

Read `coarse_to_fine.py` first: the paper's loop over the levels. `context.py` is what every search
works with, `scorers.py` says how much a token matters (`rfm.py` is the paper's way), `ranking.py`
makes a scored level of the scores, `result.py` holds what is found. `search.py` picks the search
that the options name and trims what it finds; `exhaustive.py` is the other search. What the method
is compared with lies in `lrs_edge.baselines`.
"""
