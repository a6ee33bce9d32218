"""Runs the artifacts in other runtimes and compares their logits with ONNX Runtime's: docs/runtimes.md."""
