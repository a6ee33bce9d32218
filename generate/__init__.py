"""Text in the terminal, from an artifact."""
