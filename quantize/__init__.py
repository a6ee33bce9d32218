"""fp32 artifact × recipe -> quantized artifact. Calling this package calls `cuantiza.quantize.stage.quantize`."""

import cuantiza.core.startup  # noqa: F401
from cuantiza.core.stages import make_callable

make_callable(__name__)
