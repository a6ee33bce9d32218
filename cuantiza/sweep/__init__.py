"""Builds and measures a grid of models, recipes and corpora, here or on a Ray cluster, and shows it on one page."""

import cuantiza.core.startup  # noqa: F401
