"""Run the same artifacts in other runtimes and compare their logits with ONNX Runtime's: docs/runtimes.md."""
