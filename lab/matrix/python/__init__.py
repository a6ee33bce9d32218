"""Runtimes of Python, each a program `python -m lab.matrix.python.X job.json` for the interpreter of its environment."""
