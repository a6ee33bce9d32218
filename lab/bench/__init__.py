"""Measures this project's artifacts side by side with other libraries. Only the peers import torch."""
