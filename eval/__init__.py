"""Artifacts -> measurements -> report."""

from cuantiza.core.errors import end_quietly_while_loading

end_quietly_while_loading()
