"""fp32 artifact x recipe -> quantized artifact."""

import cuantiza.core.startup  # noqa: F401
