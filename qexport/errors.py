"""Every error qexport raises on purpose, and the exit code the command line gives it.

    QexportError                 2  the user's input
    ├── CheckpointError          2  a factory or a weights file
    ├── DatasetError             2  images or annotations
    ├── CalibrationError         2  images that cannot give encodings
    ├── EncodingsError           2  an encodings table that does not fit or was edited
    ├── ArtifactError            2  an artifact that is missing, edited or of another version
    ├── RunFolderError           2  an output folder that cannot be used
    ├── UnsupportedOperator      2  an operator that a target has no lowering for
    ├── BundleError              2  a bundle that is incomplete or edited
    ├── GateFailed               1  a measured value is outside what was promised
    │   ├── ExportError          1  the artifact, read back, is not what the encodings say
    │   └── ParityError          1  nothing could be compared, or a layer is off
    └── TargetUnavailable        3  a target's software or device is missing

A message says what, where (layer, target, file), expected against found, and how to fix it.
"""

from __future__ import annotations

from typing import ClassVar


class QexportError(Exception):
    """Base of all errors that qexport raises on purpose; its text is meant for the user."""

    exit_code: ClassVar[int] = 2


class CheckpointError(QexportError):
    """A detector factory or a weights file that cannot be used."""


class DatasetError(QexportError):
    """Images or annotations that cannot be read or do not fit the detector."""


class CalibrationError(QexportError):
    """Calibration data or options that cannot give encodings."""


class EncodingsError(QexportError):
    """An encodings table that is malformed, edited, or of another detector."""


class ArtifactError(QexportError):
    """An artifact that is missing, edited after export, or of an unknown version."""


class RunFolderError(QexportError):
    """An output folder that is a file, not writable, or holds another run."""


class UnsupportedOperator(QexportError):
    """An operator of the detector that a target has no lowering for."""


class BundleError(QexportError):
    """A bundle that is incomplete or was edited."""


class GateFailed(QexportError):
    """A measured value is outside what was promised."""

    exit_code: ClassVar[int] = 1


class ExportError(GateFailed):
    """The exported artifact, read back, is not what the encodings say."""


class ParityError(GateFailed):
    """Nothing could be compared, or a layer differs by more than its tolerance."""


class TargetUnavailable(QexportError):
    """A target's software or device is missing; the message holds the command that installs it."""

    exit_code: ClassVar[int] = 3
