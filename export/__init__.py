"""Checkpoint -> fp32 artifact. Calling this package, `cuantiza.export(...)`, calls `cuantiza.export.stage.export`."""

import cuantiza.core.startup  # noqa: F401
from cuantiza.core.stages import make_callable

make_callable(__name__)
