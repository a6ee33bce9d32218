"""Export a checkpoint to an fp32 artifact. Calling this package, `cuantiza.export(...)`, calls `stage.export`."""

from cuantiza.core.errors import end_quietly_while_loading
from cuantiza.core.stages import make_callable

end_quietly_while_loading()
make_callable(__name__)
