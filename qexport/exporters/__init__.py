"""Encodings to artifact: one file a target."""
