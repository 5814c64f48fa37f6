"""An artifact around files of a test's own: a frame as it is, without resizing, and a manifest that says little."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qexport.artifact import Artifact, InputSpec, TensorSite, describe_file, save_artifact
from qexport.settings import PreprocessPlace

SHA256 = "0" * 64


def plain_input(height_px: int, width_px: int, preprocess: PreprocessPlace = "inside") -> InputSpec:
    """Return an input whose frame is neither resized nor normalised."""
    return InputSpec(
        frame_height_px=height_px,
        frame_width_px=width_px,
        preprocess=preprocess,
        resized_height_px=height_px,
        resized_width_px=width_px,
        padded_height_px=height_px,
        padded_width_px=width_px,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def write_artifact(
    folder: Path,
    *,
    target: str,
    files: Mapping[str, str],
    frame_px: tuple[int, int],
    detections: int,
    sites: tuple[TensorSite, ...] = (),
    float_sites: Mapping[str, str] | None = None,
) -> Artifact:
    """Write the manifest of files that lie in a folder.

    Args:
        folder: of the artifact.
        target: whose it is.
        files: name of each, by role.
        frame_px: height and width.
        detections: rows of the outputs, and proposals.
        sites: where quantized tensors are.
        float_sites: tensors in float32, by what they hold.
    """
    artifact = Artifact(
        target=target,
        qexport_version="test",
        versions={},
        detector_sha256=SHA256,
        encodings_sha256=SHA256,
        labels=("background", "one", "two", "three"),
        input=plain_input(*frame_px),
        proposals=detections,
        detections=detections,
        forms={},
        files=tuple(describe_file(folder, name, role) for role, name in files.items()),
        sites=sites,
        float_sites=dict(float_sites or {}),
        layers=(),
    )
    save_artifact(artifact, folder)
    return artifact
