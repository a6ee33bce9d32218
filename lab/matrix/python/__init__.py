"""The Python runtimes: each is a program `python -m lab.matrix.python.X job.json`, run in its own environment."""
