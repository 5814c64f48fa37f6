"""What can be chosen for one target alone: `-O TARGET.NAME=VALUE`, one struct a target."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from qexport.errors import QexportError


class TargetOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of a target that leaves no choice."""


class BuildOptions(TargetOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How TensorRT builds an engine."""

    workspace_mb: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="most memory that a kernel may use while it runs, MiB"),
    ] = None
    optimization_level: Annotated[
        Annotated[int, Meta(ge=0, le=5)] | None,
        Meta(description="0 builds fast, 5 looks longest; TensorRT 8.6 and newer"),
    ] = None
    timing_cache: Annotated[
        bool, Meta(description="keep the timings of kernels for the next build, engines/timing.cache")
    ] = True
    dla_core: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="run on this DLA core, what it cannot on the GPU; Jetson Xavier and Orin"),
    ] = None
    batch: Annotated[int, Meta(description="frames at a time: 1, the detector is of fixed shape")] = 1


class TensorrtOptions(BuildOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of the road through ONNX."""

    roi_align: Annotated[
        Literal["auto", "grid", "plugin"],
        Meta(
            description="grid: standard operators, on every TensorRT; plugin: classic TensorRT's ROIAlign; "
            "auto: the plugin where the library has it"
        ),
    ] = "auto"
    nms: Annotated[
        Literal["auto", "loop", "layer"],
        Meta(
            description="loop: standard operators, on every TensorRT; layer: classic TensorRT's NMS; "
            "auto: the layer where the library has it"
        ),
    ] = "auto"
    weights: Annotated[
        Literal["float", "int8"],
        Meta(description="of the .onnx: float is read by every TensorRT, int8 by 10 and newer in a quarter"),
    ] = "float"


class Torch2trtOptions(BuildOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of the road through torch2trt."""


class TfliteOptions(TargetOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of TFLite."""

    nms: Annotated[
        Literal["own", "portable"],
        Meta(
            description="own: TFLite's NON_MAX_SUPPRESSION_V4; portable: plain operators, exact while no chain of "
            "suppressions is longer than 16"
        ),
    ] = "own"


_Options = TypeVar("_Options", bound=TargetOptions)


def read_options(kind: type[_Options], target: str, assignments: Sequence[str]) -> _Options:
    """Return a target's options.

    Args:
        kind: the target's struct.
        target: its name.
        assignments: `TARGET.NAME=VALUE`; those of other targets are passed over.

    Raises:
        QexportError: an option that the target does not have, or a value that it does not take.
    """
    given: dict[str, str] = {}
    for assignment in assignments:
        owner, name, value = split_assignment(assignment)
        if owner == target:
            given[name] = value
    known = {field.name: field for field in msgspec.structs.fields(kind)}
    for name in given:
        if name not in known:
            there = ", ".join(known) or "none"
            raise QexportError(f"-O {target}.{name}: target {target} has no such option; it has {there}.")
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise QexportError(f"-O {target}: {error}. `qexport targets` says what each option takes.") from error


def split_assignment(assignment: str) -> tuple[str, str, str]:
    """Return target, name and value of `TARGET.NAME=VALUE`.

    Raises:
        QexportError: it is no assignment.
    """
    left, equals, value = assignment.partition("=")
    target, dot, name = left.partition(".")
    if not (equals and dot and target and name):
        raise QexportError(f"-O {assignment}: expected TARGET.NAME=VALUE, as in tensorrt.roi_align=grid.")
    return target, name, value


def describe_options(kind: type[TargetOptions]) -> Iterable[tuple[str, str, str]]:
    """Return name, default and meaning of each option."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        meta = next(item for item in typing.get_args(hints[field.name]) if isinstance(item, Meta))
        default = "" if field.default is None else str(field.default).lower()
        yield field.name, default, meta.description or ""
