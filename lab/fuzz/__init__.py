"""Hostile input: every format that a stage reads, broken in ways that its own structure suggests."""
