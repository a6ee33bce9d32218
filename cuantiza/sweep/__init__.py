"""A grid of models, recipes and corpora -> artifacts -> measurements -> one page; here, or on the machines of a Ray cluster."""

import cuantiza.core.startup  # noqa: F401
