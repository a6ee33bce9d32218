"""Checkpoint -> fp32 artifact."""

import core.startup  # noqa: F401
