"""Lowerings to ExecuTorch: XNNPACK subgraphs with what their kernels take, ExecuTorch's own kernels around them."""
