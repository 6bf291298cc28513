"""Watching a folder: every product that lands in it is asked its questions, once.

`products.py` finds products and tells when one is whole, `questions.py` reads what is asked,
`journal.py` remembers what was done so that a killed run goes on where it was, `worker.py` is the
loop, `asking.py` asks the engine, `delivery.py` gives answers out: `results.py` writes them, and
quarantine records, under names of `names.py`, and `hook.py` runs a command. `waking.py` is time.
docs/watch.md says how the command behaves.
"""
