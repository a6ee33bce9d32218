"""Checkpoint -> fp32 artifact."""

import cuantiza.core.startup  # noqa: F401
