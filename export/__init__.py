"""Checkpoint -> fp32 artifact."""

from cuantiza.core.errors import end_quietly_while_loading

end_quietly_while_loading()
