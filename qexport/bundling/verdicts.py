"""What a run says of an artifact, in the words and gates that go with it to the board."""

from __future__ import annotations

from qexport.artifact import Artifact
from qexport.benchmarks.report.verdict import describe_gate, parity_verdict
from qexport.errors import RunFolderError
from qexport.files import read_json
from qexport.results import AccuracyReport, Gate, ParityReport
from qexport.run_folder import RunFolder


def verdicts_of(run: RunFolder, artifact: Artifact) -> dict[str, str]:
    """Return one sentence on parity and one on accuracy; what was not measured is said.

    Raises:
        RunFolderError: parity was measured on another artifact.
    """
    return {
        "parity": _parity_text(_parity(run, artifact)),
        "accuracy": _accuracy_text(_accuracy(run), artifact.target),
    }


def gates_of(run: RunFolder, artifact: Artifact) -> tuple[Gate, ...]:
    """Return the gates of parity, and those of accuracy that are the target's. Raises as `verdicts_of`."""
    parity, accuracy = _parity(run, artifact), _accuracy(run)
    own = [gate for gate in (accuracy.gates if accuracy else ()) if gate.subject == artifact.target]
    return (*(parity.gates if parity else ()), *own)


def _parity(run: RunFolder, artifact: Artifact) -> ParityReport | None:
    path = run.file(f"{artifact.target}/parity.json")
    if not path.is_file():
        return None
    parity = read_json(path, ParityReport, RunFolderError)
    if parity.artifact_sha256 != artifact.sha256:
        raise RunFolderError(
            f"{path}: measured on the artifact {parity.artifact_sha256[:12]}, the run has {artifact.sha256[:12]}. "
            f"Run `qexport compare {run.path} --target {artifact.target}`."
        )
    return parity


def _accuracy(run: RunFolder) -> AccuracyReport | None:
    path = run.file("accuracy.json")
    return read_json(path, AccuracyReport, RunFolderError) if path.is_file() else None


def _parity_text(parity: ParityReport | None) -> str:
    text = parity_verdict(parity).text
    if parity is None:
        return text
    compared = [layer.max_step for layer in parity.layers if layer.max_step is not None]
    return (
        f"{text}: {len(compared)} layers on {parity.images} images of {parity.split}, "
        f"at most {max(compared, default=0)} steps from the integer reference"
    )


def _accuracy_text(accuracy: AccuracyReport | None, target: str) -> str:
    subjects = {one.subject: one for one in (accuracy.subjects if accuracy else ())}
    if accuracy is None or target not in subjects or "eager" not in subjects:
        return "accuracy not measured"
    before, after = subjects["eager"], subjects[target]
    failed = [gate for gate in accuracy.gates if gate.subject == target and not gate.passed]
    verdict = f"failed: {describe_gate(failed[0])}" if failed else "ok"
    return (
        f"accuracy {verdict}: VOC mAP {100 * before.voc_map50:.2f} in float, {100 * after.voc_map50:.2f} in int8; "
        f"COCO mAP {100 * before.coco_map:.2f} and {100 * after.coco_map:.2f}; {accuracy.images} images of "
        f"{accuracy.split}"
    )
