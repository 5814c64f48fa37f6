"""AIMET's encodings: `NAME_torch.encodings` and `save_encodings_to_json` by module, `NAME.encodings` by ONNX tensor.

The file holds scales alone; --weights gives the weights. `offset` is the negative of the zero point of codes that begin
at 0. AIMET's usual practice folds BatchNorm before it quantizes; whether it did is seen from the weights' scales.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qexport.calibration.checkpoints.content import Content
from qexport.calibration.checkpoints.format import Detector, Format
from qexport.calibration.checkpoints.ranges import Port, QatCheckpoint, QatRange, check_scales, name_some
from qexport.errors import CheckpointError

_ACTIVATIONS, _PARAMETERS = "activation_encodings", "param_encodings"
_ONNX_OUTPUT = re.compile(r"^/(?P<scopes>.*?)/?(?P<op>[A-Za-z]+)(_(?P<index>\d+))?_output_0$")
_ONNX_OPERATORS = {
    "Add": "add",
    "Mul": "mul",
    "Concat": "cat",
    "Resize": "upsample_nearest2d",
}
_Entry = Mapping[str, Any]


def _recognised(content: Content) -> bool:
    return content.is_json and _ACTIVATIONS in content.document and _PARAMETERS in content.document


def _read(content: Content, detector: Detector, prepare: str | None) -> QatCheckpoint:
    del prepare
    document, path = content.document, content.path
    weights = list(_weights(document[_PARAMETERS], path))
    activations, nameless = _activations(document[_ACTIVATIONS], path)
    prefix = _prefix([entry.path for entry in weights], detector)
    ranges = [_under(prefix, entry) for entry in (*weights, *activations)]
    unknown = sorted({entry.path for entry in ranges if not _is_known(entry, detector)})
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} encodings name modules that the detector does not have: {name_some(unknown)}. "
            "They are of another detector, or AIMET's model preparer renamed its modules: quantize the detector under "
            "its own module paths."
        )
    notes = (
        (
            f"{len(nameless)} encodings of activations have names that no module can be told from "
            f"({name_some(nameless)}), and were left out. NAME_torch.encodings has modules' names.",
        )
        if nameless
        else ()
    )
    return detector.checkpoint(FORMAT.name, path, None, check_scales(ranges, path), notes)


def _weights(found: object, path: Path) -> Iterator[QatRange]:
    for name, entries in _by_name(found):
        layer, _, parameter = name.rpartition(".")
        if parameter == "weight":
            yield _range(entries, layer, "weight", f"{_PARAMETERS}.{name}", path)


def _activations(found: object, path: Path) -> tuple[list[QatRange], list[str]]:
    """Return the ranges of activations, and the names that no module can be told from."""
    ranges, nameless = [], []
    for name, entries in _by_name(found):
        buffer = f"{_ACTIVATIONS}.{name}"
        if isinstance(entries, Mapping):
            ports: tuple[Port, ...] = ("input", "output")
            for port in ports:
                first = entries.get(port, {}).get("0")
                if first is not None:
                    ranges.append(_range([first], name, port, f"{buffer}.{port}.0", path))
            continue
        place = _place_of(name)
        if place is None:
            nameless.append(name)
        else:
            layer, call, op = place
            ranges.append(_range(entries, layer, "output", buffer, path, call=call, op=op))
    return ranges, nameless


def _by_name(found: object) -> Iterator[tuple[str, Any]]:
    """Yield names with their encodings, of the dict format and of the list format."""
    if isinstance(found, Mapping):
        yield from found.items()
    elif isinstance(found, Sequence):
        yield from ((entry["name"], [entry]) for entry in found)


def _range(
    entries: Sequence[_Entry],
    layer: str,
    port: Port,
    buffer: str,
    path: Path,
    *,
    call: int | None = None,
    op: str = "",
) -> QatRange:
    """Return one tensor's range of its encodings: one, or one per channel."""
    try:
        scales = [scale for entry in entries for scale in _listed(entry["scale"])]
        offsets = [offset for entry in entries for offset in _listed(entry["offset"])]
        bits = int(entries[0].get("bitwidth", entries[0].get("bw", 8)))
        kind = str(entries[0].get("dtype", "int")).lower()
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the encoding {buffer} has no scale and offset ({type(error).__name__}: {error}). "
            "Export the encodings again with AIMET."
        ) from error
    if kind != "int":
        raise CheckpointError(
            f"{path}: {buffer} is of type {kind}, expected int. Train with integer quantizers."
        )
    return QatRange(
        path=layer,
        port=port,
        scale=tuple(float(np.float32(scale)) for scale in scales),
        buffer=buffer,
        call=call,
        op=op,
        zero_point=tuple(-round(offset) for offset in offsets),
        qmin=0,
        qmax=2**bits - 1,
        axis=0 if len(scales) > 1 else None,
        includes_norm=None,
    )


def _listed(value: object) -> Sequence[float]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else [value]  # type: ignore[list-item]


def _place_of(name: str) -> tuple[str, int | None, str] | None:
    """Return module path, call and operator of `/backbone/fpn/Add_1_output_0`; None for other names."""
    match = _ONNX_OUTPUT.match(name)
    if match is None:
        return None
    path: list[str] = []
    for scope in match["scopes"].split("/"):
        above, _, own = scope.rpartition(".")
        if above and path and path[-1] == above:
            path.append(own)  # the exporter repeats the container's name: /layer1/layer1.0
        elif scope:
            path += scope.split(".")
    index = int(match["index"] or 0)
    op = _ONNX_OPERATORS.get(match["op"], "")
    if op:
        return ".".join(path), None, op + (f"#{index}" if index else "")
    return ".".join(path), index if index else None, ""


def _prefix(layers: Sequence[str], detector: Detector) -> str:
    """Return what has to stand before the names: AIMET quantizes the backbone alone, often under its own names."""
    options = ["", *(f"{name}." for name in ("backbone", "backbone.body", "rpn.head", "roi_heads"))]
    fitting = {option: sum(option + layer in detector.modules for layer in layers) for option in options}
    return max(options, key=lambda option: fitting[option])


def _under(prefix: str, entry: QatRange) -> QatRange:
    if not prefix:
        return entry
    return dataclasses.replace(entry, path=f"{prefix}{entry.path}".rstrip("."))


def _is_known(entry: QatRange, detector: Detector) -> bool:
    """Tell whether a range's module is the detector's; of a functional module the one above it counts."""
    above = entry.path.rpartition(".")[0]
    return entry.path in detector.modules or (
        entry.port == "output" and bool(above) and above in detector.modules
    )


FORMAT = Format(
    "AIMET encodings",
    "JSON with activation_encodings and param_encodings",
    _recognised,
    _read,
    takes_prepare=False,
    has_weights=False,
)
