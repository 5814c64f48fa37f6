"""Activations that are one activation layer each."""

from __future__ import annotations

from collections.abc import Mapping

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.data_types import live
from qexport.plugins.torch2trt.dotted import forms
from qexport.plugins.torch2trt.interface import ConversionContext, argument, give
from qexport.plugins.torch2trt.registration import Convert, bind
from qexport.runtimes.tensorrt_library import load_library


def _activate(
    context: ConversionContext, kind: str, alpha: float | None = None, beta: float | None = None
) -> None:
    tensor = live(context, argument(context, 0, "input"))
    layer = context.network.add_activation(tensor, getattr(load_library().trt.ActivationType, kind))
    if alpha is not None:
        layer.alpha = alpha
    if beta is not None:
        layer.beta = beta
    give(context, layer.get_output(0))


def _leaky_relu(context: ConversionContext, kind: str) -> None:
    _activate(context, kind, alpha=float(argument(context, 1, "negative_slope", 0.01)))


def _elu(context: ConversionContext, kind: str) -> None:
    _activate(context, kind, alpha=float(argument(context, 1, "alpha", 1.0)))


def _hardtanh(context: ConversionContext, kind: str) -> None:
    low, high = argument(context, 1, "min_val", -1.0), argument(context, 2, "max_val", 1.0)
    _activate(context, kind, alpha=float(low), beta=float(high))


def _relu6(context: ConversionContext, kind: str) -> None:
    _activate(context, kind, alpha=0.0, beta=6.0)


def _softplus(context: ConversionContext, kind: str) -> None:
    beta = float(argument(context, 1, "beta", 1.0))
    _activate(context, kind, alpha=1 / beta, beta=beta)


def _gelu(context: ConversionContext, kind: str) -> None:
    trt = load_library().trt
    approximate = argument(context, 1, "approximate", "none")
    kind = "GELU_TANH" if approximate == "tanh" else "GELU_ERF"
    if not hasattr(trt.ActivationType, kind):
        raise UnsupportedOperator(f"gelu: TensorRT {trt.__version__} has no such layer; TensorRT 10 has.")
    _activate(context, kind)


CONVERTERS: Mapping[str, Convert] = {
    **bind(_activate, "RELU", *forms("relu")),
    **bind(_relu6, "CLIP", *forms("relu6")),
    **bind(_activate, "SIGMOID", *forms("sigmoid")),
    **bind(_activate, "TANH", *forms("tanh")),
    **bind(_leaky_relu, "LEAKY_RELU", *forms("leaky_relu")),
    **bind(_elu, "ELU", *forms("elu")),
    **bind(_hardtanh, "CLIP", *forms("hardtanh")),
    **bind(_softplus, "SOFTPLUS", *forms("softplus")),
    **bind(_gelu, "GELU_ERF", *forms("gelu")),
}
"""By dotted name of the torch function."""
