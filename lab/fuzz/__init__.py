"""Fuzzing: every file format that a stage reads is broken in ways that the format's own structure suggests."""
