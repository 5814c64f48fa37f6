"""Checkpoints: read one without running its code, and put it into a detector whole or not at all."""

from __future__ import annotations

import codecs
import copy
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qexport.errors import CheckpointError

USUAL_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "ema", "model_ema", "net", "weights")
"""Where training scripts keep the state dict inside a checkpoint."""

_PREFIXES = ("module.", "model.", "_orig_mod.")  # DataParallel, Lightning, torch.compile
_SAVE_PLAIN = 'Save a plain state dict: torch.save(model.state_dict(), "weights.pt").'
_EXPECTED = "Expected a checkpoint written by torch.save (.pt, .pth) or a .safetensors file."
_NAMED = 10
_HEAD_BYTES = 512
_TORCH_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6, after the protocol bytes
_IMAGE_MAGICS = (
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"RIFF", "WebP"),
)
_FEW = 0.5
"""Below this share of keys that fit by name and shape, the file is said to be of another architecture."""


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint; nothing in the file is executed.

    Reads what `torch.save` writes and safetensors files, told apart by their bytes. The state dict is
    the whole file or stands one level below (`USUAL_KEYS`). Prefixes that wrappers add are taken off
    where every key has them.

    Returns:
        Parameters and buffers by key, on the CPU; floating-point values as float32.

    Raises:
        CheckpointError: missing, empty, of another format, cut short, holding objects that would run
            code, holding no or several state dicts, or holding NaN or infinite values.
    """
    state = state_of(read_checkpoint_file(path), path)
    check_finite(state, str(path))
    return state


def read_checkpoint_file(path: Path) -> object:
    """Return what a checkpoint file holds, on the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: as `load_weights` but for the state dict and its values.
    """
    head = _read_head(path)
    if head[8:9] == b"{":  # safetensors: eight bytes of header length, then the JSON header
        return _read_safetensors(path)
    if head.startswith(b"PK") or _is_legacy_torch(head):
        return _read_torch(path)
    raise CheckpointError(f"{path}: {_describe_foreign(head, path)}")


def state_of(loaded: object, path: Path) -> dict[str, Tensor]:
    """Return the one state dict in what `read_checkpoint_file` gave: without prefixes, in float32.

    Raises:
        CheckpointError: no state dict or several, or tensors that are not dense.
    """
    state = _without_prefixes(_find_state_dict(loaded, path))
    return {key: _to_float32(key, value, path) for key, value in state.items()}


def apply_weights(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copy a state dict into `module`: every key fits, or `module` stays as it was.

    `num_batches_tracked`, which only training reads, may be missing or left over. Keys of earlier
    torchvision versions are renamed by torchvision's own modules.

    Args:
        module: the detector; its parameters and buffers are overwritten.
        state: what `load_weights` returns.
        source: name of the checkpoint for messages.

    Raises:
        CheckpointError: missing, unexpected or wrong-shape keys; the message says where the number of
            classes or the architecture differs.
    """
    own = module.state_dict()
    missing = _without_counters(own.keys() - state.keys())
    unexpected = _without_counters(state.keys() - own.keys())
    if missing or unexpected or _wrong_shapes(own, state):
        # A trial on a copy: only the modules themselves know which old names they still accept.
        try:
            result = copy.deepcopy(module).load_state_dict(dict(state), strict=False)
        except RuntimeError as error:  # shapes, which torch refuses even where keys may differ
            raise CheckpointError(_explain_misfit(own, state, missing, unexpected, source)) from error
        missing = _without_counters(result.missing_keys)
        unexpected = _without_counters(result.unexpected_keys)
        if missing or unexpected:
            raise CheckpointError(_explain_misfit(own, state, missing, unexpected, source))
    module.load_state_dict(dict(state), strict=False)


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse a state dict with NaN or infinite values.

    Raises:
        CheckpointError: names the tensors and counts their values.
    """
    bad = {
        key: int((~torch.isfinite(value)).sum())
        for key, value in state.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    }
    if bad:
        names = _first([f"{key} ({count})" for key, count in bad.items()])
        raise CheckpointError(
            f"{source}: {sum(bad.values())} weights are NaN or infinite, in {len(bad)} of {len(state)} "
            f"tensors: {names}. Such a detector cannot be quantized. Give an earlier checkpoint, or train "
            "with a lower learning rate or gradient clipping."
        )


def _read_head(path: Path) -> bytes:
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder; give the weights file in it (.pt, .pth or .safetensors).")
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such weights file. Check the path given with --weights."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if not head:
        raise CheckpointError(f"{path}: the file is empty (0 bytes). Copy or save the checkpoint again.")
    return head


def _is_legacy_torch(head: bytes) -> bool:
    return head.startswith(b"\x80") and head[2:].startswith(_TORCH_LEGACY_MAGIC)


def _describe_foreign(head: bytes, path: Path) -> str:
    """Say what a file is that is no checkpoint, and what to give instead."""
    for magic, name in _IMAGE_MAGICS:
        if head.startswith(magic):
            return f"a {name} image, not weights. {_EXPECTED}"
    if head.startswith(b"\x80"):
        return f"a Python pickle, which can run code when it is loaded, so it is refused. {_SAVE_PLAIN}"
    if _is_text(head):
        return _describe_text(head)
    if path.suffix == ".safetensors":
        return "not a safetensors file, or cut short within its header. Copy or save it again."
    return f"not a weights file (it begins with bytes {head[:8].hex(' ')}). {_EXPECTED}"


def _describe_text(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves. Run `git lfs pull` in that repository."
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return f"a web page, not weights: the download went wrong. {_EXPECTED}"
    return f"a text file, not weights (it begins {head[:30].decode(errors='replace')!r}). {_EXPECTED}"


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the head may end within a character
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or cut short ({error}). Copy or save the file again."
        ) from error


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            # torch warns of its own plans (pickle protocols, quantized and sparse tensors), which would pass
            # for damage where warnings are errors. What it cannot read raises.
            warnings.simplefilter("ignore")
            loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_explain_refusal(path, error)}") from error
    except Exception as error:  # a damaged pickle may fail in any way: KeyError, EOFError, OSError, ...
        raise CheckpointError(f"{path}: {_explain_damage(path, error)}") from error
    return loaded


def _explain_refusal(path: Path, error: pickle.UnpicklingError) -> str:
    """Name the objects for which the safe loader refused the file."""
    names = _unsafe_names(path) or re.findall(r"GLOBAL ([\w.]+)", str(error))
    if not names:
        return (
            f"not a checkpoint that torch can read without running code: {_last_line(error)}. {_SAVE_PLAIN}"
        )
    if any(name.startswith(("torch.nn.", "torchvision.models.", "torchvision.ops.")) for name in names):
        return (
            f"a whole pickled model ({_first(names)}), not a state dict. Loading it would run code, so it is "
            f"refused. Load it where it was trained. {_SAVE_PLAIN} "
            "Give the code that builds the model with --model file.py:function."
        )
    return (
        f"the file wants to run code: beside tensors it holds {_first(names)}. It is refused, and nothing "
        f"in it was run. If you trust it, load it where it was made. {_SAVE_PLAIN}"
    )


def _unsafe_names(path: Path) -> list[str]:
    if not zipfile.is_zipfile(path):
        return []
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (
        pickle.UnpicklingError
    ):  # an instruction outside torch's own pickles: the caller has the first error
        return []


def _explain_damage(path: Path, error: Exception) -> str:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
        if "constants.pkl" in names:
            return f"a TorchScript archive, not a state dict. {_SAVE_PLAIN}"
        if "data.pkl" not in names:
            return f"a zip archive without a checkpoint in it ({_first(names)}). Give the .pt file itself."
    size = path.stat().st_size
    return f"damaged or cut short ({size} bytes; {_last_line(error)}). Copy or save the checkpoint again."


def _find_state_dict(loaded: object, path: Path) -> Mapping[str, Tensor]:
    """Return the one mapping of tensors in a checkpoint."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(loaded).__name__}, expected a state dict. {_SAVE_PLAIN}"
        )
    if _is_state_dict(loaded):
        return loaded
    nested = [str(key) for key, value in loaded.items() if _is_state_dict(value)]
    usual = [key for key in nested if key in USUAL_KEYS]
    found = usual or nested
    if len(found) == 1:
        state: Mapping[str, Tensor] = loaded[found[0]]
        return state
    if found:
        raise CheckpointError(
            f"{path}: holds {len(found)} state dicts ({_first(found)}) and nothing says which one is meant. "
            f'Save one of them: torch.save(torch.load("{path.name}")["{found[0]}"], "weights.pt").'
        )
    tensors = sum(isinstance(value, Tensor) for value in loaded.values())
    keys = _first([f"{key}: {type(value).__name__}" for key, value in loaded.items()]) or "nothing"
    raise CheckpointError(
        f"{path}: holds no state dict: {tensors} of {len(loaded)} entries are tensors, and no entry is a "
        f"dict of tensors. It has {keys}. {_SAVE_PLAIN}"
    )


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())
    )


def _without_prefixes(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            return _without_prefixes({key.removeprefix(prefix): value for key, value in state.items()})
    return state


def _to_float32(key: str, value: Tensor, path: Path) -> Tensor:
    if value.is_quantized or value.layout != torch.strided:
        kind = "quantized" if value.is_quantized else "sparse"
        raise CheckpointError(
            f"{path}: {key} is a {kind} tensor, expected dense float weights. {_SAVE_PLAIN}"
        )
    return value.detach().to(torch.float32) if value.is_floating_point() else value.detach()


def _wrong_shapes(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    return [key for key in own if key in state and state[key].shape != own[key].shape]


def _without_counters(keys: Iterable[str]) -> list[str]:
    return sorted(key for key in keys if not key.endswith("num_batches_tracked"))


def _explain_misfit(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    source: str,
) -> str:
    """Say how a state dict differs from the detector that it should fit."""
    wrong = _wrong_shapes(own, state)
    fitting = sum(key in state and state[key].shape == value.shape for key, value in own.items())
    # The predictor alone is wrong: fine-tuning for other classes, the commonest case by far.
    score = next((key for key in wrong if key.endswith("cls_score.weight")), None)
    if score and all(".box_predictor." in key for key in wrong + missing + unexpected):
        expected, found = own[score].shape[0], state[score].shape[0]
        said = (
            f"the weights are for {found} classes, the detector has {expected} (background included). "
            f"Build it with num_classes={found}, or give the weights that were trained for {expected}."
        )
    elif fitting < _FEW * len(own):
        said = (
            f"the weights are of another architecture: {fitting} of the detector's {len(own)} tensors fit by "
            "name and shape. Give the factory that the weights were trained with."
        )
    else:
        said = (
            "the weights do not fit the detector; nothing was loaded. Give the factory of the training run."
        )
    shapes = [f"{key} {tuple(state[key].shape)}, expected {tuple(own[key].shape)}" for key in wrong]
    parts = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
    lines = [f"  {len(names)} {name}: {_first(names)}" for name, names in parts if names]
    return "\n".join([f"{source}: {said}", *lines])


def _first(names: list[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch puts the reason between advice to load without safety and a link.
    reasons = [
        line for line in lines if not line.startswith(("Weights only", "Please", "Check the", "(1)", "(2)"))
    ]
    return (reasons or lines or [type(error).__name__])[0].rstrip(".")[:200]
