"""Recipes: a file for each kind, with its fields, its line of description and what it runs; registry.py names them.

This file imports nothing: it belongs to the rebuild digest of every recipe, and so would all that it imports.
"""
