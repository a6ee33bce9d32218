"""fp32 artifact x recipe -> quantized artifact."""

import core.startup  # noqa: F401
