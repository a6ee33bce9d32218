"""Checkpoint -> fp32 artifact."""
