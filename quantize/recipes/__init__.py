"""The recipes. Each kind has a file with its settings, its description and its steps; registry.py gives them names.

This file imports nothing, because it belongs to the rebuild digest of every recipe, and so would all that it imports.
"""
