"""Converters for torch2trt, one operator a file, and what runs them without dropping an operator."""
