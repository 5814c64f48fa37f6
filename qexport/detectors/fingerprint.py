"""The fingerprint that ties encodings and artifacts to the detector they were made for."""

from __future__ import annotations

import hashlib

import msgspec

from qexport.detectors.static import StaticDetector


def fingerprint(static: StaticDetector) -> str:
    """Return the SHA-256 of module paths, weights and image geometry, in hex.

    The number of proposals and of detections is left out: it changes no feature map, so encodings stay valid.
    """
    spec = static.spec
    geometry = (spec.resized_height_px, spec.resized_width_px, spec.padded_height_px, spec.padded_width_px)
    digest = hashlib.sha256(msgspec.json.encode([*geometry, *spec.mean, *spec.std]))
    for name, tensor in sorted(static.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
