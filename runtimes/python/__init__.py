"""Runtimes of Python, each a program `python -m runtimes.python.X job.json` for the interpreter of its environment."""
