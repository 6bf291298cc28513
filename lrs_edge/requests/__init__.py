"""Requests: from a submitted question to its answer, and what it may cost.

Read in this order: `options.py` (what can be asked for), `queue.py`, `ticket.py` and `stream.py`
(one worker, and readers in any thread), `question_plan.py` and `question_run.py` (one question,
checked, then on its way through search, prefill and decode), `clock.py`, `rates.py`, `budget.py`
and `sharing.py` (time, tiles and tokens), `cache_pool.py`, `scene_caches.py` and `memory.py` (what
is kept between questions), `progress.py`.
"""
