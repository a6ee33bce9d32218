"""The code that export, quantize and eval share. It imports none of these stages, and never torch."""
