"""Export a checkpoint to an fp32 artifact. Calling this package, `cuantiza.export(...)`, calls `stage.export`."""

import cuantiza.core.startup  # noqa: F401
from cuantiza.core.stages import make_callable

make_callable(__name__)
