# Short names for scripts/dev.py, which needs nothing but Python.
PYTHON ?= python3

.PHONY: demo test slow docs clean

demo:
	$(PYTHON) scripts/dev.py demo

test:
	$(PYTHON) scripts/dev.py test

slow:
	$(PYTHON) scripts/dev.py slow

docs:
	.venv-dev/bin/python scripts/make_docs.py

clean:
	rm -rf .venv .venv-dev build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
