"""fp32 artifact x recipe -> quantized artifact."""
