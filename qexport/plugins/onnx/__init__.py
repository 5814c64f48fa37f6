"""Lowerings to ONNX."""
