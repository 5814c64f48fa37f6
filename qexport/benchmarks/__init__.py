"""Measurements: parity, latency, accuracy, complexity, and the report over them."""
