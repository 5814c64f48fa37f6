"""From the quantized graph to PyTorch's own quantized modules, at the same module paths."""
