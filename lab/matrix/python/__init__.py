"""Python runtimes. Each is a program, `python -m lab.matrix.python.X job.json`, for its own environment."""
