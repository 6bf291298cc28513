"""Evaluation: a bundle's answers to a question file, scored as the LRS-VQA authors do.

`questions.py` reads question files (`question_rows.py` makes rows of bytes,
`question_formats.py` questions of rows), `runner.py` asks and records, `results.py` is the file in
between, `matching.py` and `wordnet.py` decide what is right, `coverage.py` whether the search
looked at the evidence, `flops.py` what it cost, `scoring.py` and `comparison.py` make the figures,
and `tables.py` writes them. docs/eval.md says how it is done and where it comes from.
"""
