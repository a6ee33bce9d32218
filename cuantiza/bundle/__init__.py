"""A folder as the Hugging Face Hub and its tools expect it."""
