"""What a converter is to the registry: one function, or a family that differs in one word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

from qexport.plugins.torch2trt.interface import ConversionContext

Convert = Callable[[ConversionContext], None]
"""Adds the layers of one call to the network and gives its result a TensorRT tensor."""
_Choice = TypeVar("_Choice")


class Operator(Protocol):
    """A file about one operator."""

    @property
    def FUNCTIONS(self) -> tuple[str, ...]:  # noqa: N802 - a constant of the file
        """Dotted names of the torch functions that are this operator, in-place forms among them."""

    def convert(self, context: ConversionContext) -> None:
        """Add the layers of one call."""


@runtime_checkable
class Family(Protocol):
    """A file about operators that are one layer each and differ in its kind."""

    @property
    def CONVERTERS(self) -> Mapping[str, Convert]:  # noqa: N802 - a constant of the file
        """By dotted name of the torch function."""


def bind(
    convert: Callable[[ConversionContext, _Choice], None], choice: _Choice, *functions: str
) -> dict[str, Convert]:
    """Return the converters of functions that are the same layer of the same kind."""
    return dict.fromkeys(functions, partial(_call, convert, choice))


def _call(
    convert: Callable[[ConversionContext, _Choice], None], choice: _Choice, context: ConversionContext
) -> None:
    convert(context, choice)
