"""Artifacts -> measurements -> report."""
