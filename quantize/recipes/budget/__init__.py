"""The recipes that are given a budget, and decide linear layer by linear layer how to keep it.

This file imports nothing, as that of recipes/ does not: it belongs to the rebuild digest of each of them.
"""
