"""Makes a folder in the layout that the Hugging Face Hub and its tools expect."""
