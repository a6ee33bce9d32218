"""A grid of models, recipes and corpora -> artifacts -> measurements -> one page; here, or on the machines of a Ray cluster."""

from cuantiza.core.errors import end_quietly_while_loading

end_quietly_while_loading()
