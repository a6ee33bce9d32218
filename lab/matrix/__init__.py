"""The same artifacts in other runtimes, their logits compared with ONNX Runtime's: docs/runtimes.md."""
