"""Builds and measures a grid of models, recipes and corpora, here or on a Ray cluster, and shows it on one page."""

from cuantiza.core.errors import end_quietly_while_loading

end_quietly_while_loading()
