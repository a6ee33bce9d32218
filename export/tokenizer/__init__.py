"""The tokenizer of an artifact: tokenizer.json and tokenizer_config.json, from whatever files the checkpoint has."""
