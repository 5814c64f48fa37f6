"""Lowerings to ExecuTorch: XNNPACK subgraphs with what their kernels take, ExecuTorch's own kernels around them."""

import importlib
import warnings

with warnings.catch_warnings():
    # ExecuTorch reads its own files by functions that Python will drop; said once, when it is imported first.
    warnings.simplefilter("ignore")
    importlib.import_module("executorch.exir")
    importlib.import_module("executorch.backends.xnnpack.xnnpack_preprocess")
