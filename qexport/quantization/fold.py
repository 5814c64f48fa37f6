"""Fold batch normalisation into the convolution before it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torchvision.ops.misc import FrozenBatchNorm2d

from qexport.detectors.static import StaticDetector
from qexport.quantization.graph import export_graph, op_name, site_of

_FUSE = {"conv2d": fuse_conv_bn_eval, "linear": fuse_linear_bn_eval}


def fold_batch_norm(static: StaticDetector) -> StaticDetector:
    """Return a copy whose BatchNorms, frozen ones too, are part of the convolution or linear before them.

    The values change by float rounding alone (SQNR above 100 dB). A BatchNorm that does not follow a
    convolution or a linear by itself stays, in float.
    """
    folded = _thawed(static)
    modules = dict(folded.named_modules())
    for norm_path, path in _pairs(folded).items():
        fuse = fuse_conv_bn_eval if isinstance(modules[path], nn.Conv2d) else fuse_linear_bn_eval
        folded.set_submodule(path, fuse(modules[path], modules[norm_path]))
        folded.set_submodule(norm_path, nn.Identity())
    return folded.eval().requires_grad_(False)


def folded_pairs(static: StaticDetector) -> dict[str, str]:
    """Return the path of each BatchNorm that is folded, and of the convolution or linear that takes it in."""
    return _pairs(_thawed(static))


def _thawed(static: StaticDetector) -> StaticDetector:
    thawed = copy.deepcopy(static)
    for path, module in list(thawed.named_modules()):
        if isinstance(module, FrozenBatchNorm2d):
            thawed.set_submodule(path, _thaw(module))
    return thawed


def _pairs(thawed: StaticDetector) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for node in export_graph(thawed).graph.nodes:
        if "batch_norm" not in op_name(node):
            continue
        producer = node.args[0]
        if op_name(producer) in _FUSE and len(producer.users) == 1:
            pairs[site_of(node).path] = site_of(producer).path
    return pairs


def _thaw(frozen: FrozenBatchNorm2d) -> nn.BatchNorm2d:
    """Return the BatchNorm2d, in eval mode, that computes what a FrozenBatchNorm2d does."""
    norm = nn.BatchNorm2d(frozen.weight.numel(), eps=frozen.eps).eval()
    with torch.no_grad():
        norm.weight.copy_(frozen.weight)
        norm.bias.copy_(frozen.bias)
        assert norm.running_mean is not None and norm.running_var is not None  # BatchNorm2d tracks by default
        norm.running_mean.copy_(frozen.running_mean)
        norm.running_var.copy_(frozen.running_var)
    return norm
