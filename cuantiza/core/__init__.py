"""What export, quantize and eval share. Imports none of them, and never torch."""
