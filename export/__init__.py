"""Export a checkpoint to an fp32 ONNX artifact."""

import cuantiza.core.startup  # noqa: F401
