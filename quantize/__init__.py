"""fp32 artifact × recipe -> quantized artifact. Calling this package calls `cuantiza.quantize.stage.quantize`."""

from cuantiza.core.errors import end_quietly_while_loading
from cuantiza.core.stages import make_callable

end_quietly_while_loading()
make_callable(__name__)
