"""A run's folder: its settings, and which stages are complete.

    RUN/run.json               settings, versions, the exact command
    RUN/stages/STAGE.json      digests of what a finished stage read and wrote
    RUN/detector.json  encodings.json  detections.json  accuracy.json
    RUN/detections/...         what each subject detected
    RUN/TARGET/...             artifact, parity, latency, complexity, memory
    RUN/report.html ...        the report

A stage is complete when its record says that it read what is there now and wrote what is there now. A run
that was interrupted, by Ctrl-C or by kill -9, goes on at the first stage that is not complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from qexport.errors import RunFolderError
from qexport.files import read_json, sha256_file, sha256_json, write_json
from qexport.settings import RunRecord, Settings

RUN_FILE = "run.json"
STAGES = "stages"


class StageRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a finished stage read and wrote."""

    inputs_sha256: str
    outputs: dict[str, str]
    """SHA-256 by path within the run folder."""
    seconds: float
    """How long it took, on the machine and day that it ran."""


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path, record: RunRecord) -> None:
        self.path = path
        self.record = record

    @property
    def settings(self) -> Settings:
        """What the run was asked to do."""
        return self.record.settings

    def file(self, name: str) -> Path:
        """Return the path of a file of the run."""
        return self.path / name

    def stage(
        self, name: str, inputs: Mapping[str, object], outputs: Sequence[str], work: Callable[[], None]
    ) -> bool:
        """Run a stage unless it is complete; return whether it ran.

        Args:
            name: of the stage, `export.onnx`.
            inputs: everything that decides the result, digests of files among them; the versions of the
                packages are added.
            outputs: files that the stage writes, within the run folder.
            work: writes them, each whole or not at all.

        Raises:
            RunFolderError: one of the outputs was edited since: it is not overwritten.
        """
        record_path = self._record_path(name)
        digest = sha256_json([self.record.qexport_version, self.record.versions, inputs])
        if self._is_complete(record_path, digest, outputs):
            return False
        record_path.unlink(missing_ok=True)
        started = time.perf_counter()
        work()
        written = {output: sha256_file(self.path / output) for output in outputs}
        seconds = round(time.perf_counter() - started, 3)
        write_json(record_path, StageRecord(inputs_sha256=digest, outputs=written, seconds=seconds))
        return True

    def forget(self, name: str) -> None:
        """Let a stage run again, complete or not."""
        self._record_path(name).unlink(missing_ok=True)

    def discard(self, *names: str) -> None:
        """Remove what stages wrote, with their records: it was made of something that is being replaced.

        Args:
            names: of stages; none at all means every stage but `inspect` and `calibrate`.
        """
        for record_path in sorted((self.path / STAGES).glob("*.json")):
            name = record_path.stem
            if name not in names if names else name in ("inspect", "calibrate"):
                continue
            for output in read_json(record_path, StageRecord, RunFolderError).outputs:
                (self.path / output).unlink(missing_ok=True)
            record_path.unlink()

    def require(self, name: str, command: str) -> Path:
        """Return a file that an earlier stage wrote.

        Raises:
            RunFolderError: it is not there; the message names the command that writes it.
        """
        path = self.path / name
        if not path.is_file():
            raise RunFolderError(f"{path} is missing: run `{command}` first.")
        return path

    def digest(self, name: str) -> str:
        """Return the SHA-256 of a file of the run, or an empty text where it is missing."""
        path = self.path / name
        return sha256_file(path) if path.is_file() else ""

    def _record_path(self, name: str) -> Path:
        return self.path / STAGES / f"{name}.json"

    def _is_complete(self, record_path: Path, digest: str, outputs: Sequence[str]) -> bool:
        if not record_path.is_file():
            return False
        record = read_json(record_path, StageRecord, RunFolderError)
        if record.inputs_sha256 != digest or set(record.outputs) != set(outputs):
            return False
        for output in outputs:
            found = self.digest(output)
            # The record is written last and removed first, so no interrupted run leaves this behind.
            if found and found != record.outputs[output]:
                raise RunFolderError(
                    f"{self.path / output} was changed after stage {record_path.stem} wrote it. "
                    "Put the original back, or delete the file to have it made again."
                )
        return all(self.digest(output) for output in outputs)


def create_run(path: Path, record: RunRecord) -> RunFolder:
    """Make a run's folder, or take up the run that it holds.

    Raises:
        RunFolderError: it is a file, is not writable, holds something else, or another run.
    """
    if holds_run(path):
        run = open_run(path)
        changed = _differences(run.record, record)
        if changed:
            raise RunFolderError(
                f"{path} holds another run; it differs in {', '.join(changed)}. "
                "Choose another --out, or delete that folder."
            )
        return run
    require_free(path)
    write_json(path / RUN_FILE, record)
    _remove_partial_files(path)
    return RunFolder(path, record)


def require_free(path: Path) -> None:
    """Refuse a folder in which something else lies.

    Raises:
        RunFolderError: it holds files that are no run's.
    """
    try:
        others = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}. Choose another --out.") from error
    # What a run leaves that was killed while it wrote its very first file.
    others = [name for name in others if not (name.startswith(f".{RUN_FILE}.") and name.endswith(".part"))]
    if others:
        raise RunFolderError(
            f"{path} holds something that is not a run of qexport ({others[0]}). Choose another --out."
        )


def holds_run(path: Path) -> bool:
    """Say whether a folder holds a run.

    Raises:
        RunFolderError: it is a file, or what leads to it cannot be read.
    """
    try:
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path} is a file; a run takes a folder. Choose another.")
        return (path / RUN_FILE).is_file()
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}. Choose another folder.") from error


def open_run(path: Path) -> RunFolder:
    """Open a run's folder; remains of a write that was cut off are removed.

    Raises:
        RunFolderError: it is not there or holds no run.
    """
    if not holds_run(path):
        raise RunFolderError(
            f"{path} holds no run of qexport: no {RUN_FILE}. Make one with `qexport run` or `qexport inspect`."
        )
    record = read_json(path / RUN_FILE, RunRecord, RunFolderError)
    _remove_partial_files(path)
    return RunFolder(path, record)


def change_record(run: RunFolder, record: RunRecord) -> RunFolder:
    """Rewrite a run's record; stages that depend on what changed are no longer complete."""
    if record == run.record:
        return run
    write_json(run.path / RUN_FILE, record)
    return RunFolder(run.path, record)


def _remove_partial_files(path: Path) -> None:
    for partial in path.rglob(".*.part"):
        partial.unlink(missing_ok=True)


def _differences(old: RunRecord, new: RunRecord) -> list[str]:
    before, after = (msgspec.to_builtins(record.settings) for record in (old, new))
    names = [
        f"{name} ({before[name]!r} there, {after[name]!r} asked)"
        for name in after
        if before[name] != after[name]
    ]
    if old.weights_sha256 != new.weights_sha256:
        names.append("weights (the file changed)")
    if old.dataset_sha256 != new.dataset_sha256:
        names.append("data (images or annotations changed)")
    return names
