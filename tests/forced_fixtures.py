"""What every runtime promises that runs layers on inputs that it is given."""

from __future__ import annotations

import numpy as np
from conftest import Frame
from numpy.typing import NDArray

from qexport.runtimes.runner import ForcedRunner
from qexport.sites import codes_of

Codes = dict[str, NDArray[np.int8]]


def free_run(runner: ForcedRunner, frame: Frame) -> tuple[Codes, NDArray[np.float32]]:
    """Run an open runner by itself; return its codes by key, and its proposals."""
    sites, proposals = runner.artifact.sites, runner.artifact.float_sites["proposals"]
    found = runner.run(runner.input_of(frame), [*(site.tensor for site in sites), proposals])
    codes = {site.key: codes_of(site, found[site.tensor]) for site in sites}
    return codes, found[proposals].astype(np.float32)


def assert_forced_run_reproduces(runner: ForcedRunner, frame: Frame) -> None:
    """Feed a runtime what it computed itself: the very same must come out, bit for bit, and of nothing else.

    Args:
        runner: open.
        frame: (H, W, 3) uint8 RGB of the artifact's size, with something to detect on it.
    """
    codes, proposals = free_run(runner, frame)
    forced = runner.run_forced(runner.input_of(frame), codes, proposals)
    assert forced.keys() == codes.keys()
    for key, wanted in codes.items():
        np.testing.assert_array_equal(forced[key], wanted, err_msg=key)
    _assert_only_the_image_depends_on_the_frame(runner, frame, codes, proposals)
    _assert_codes_given_reach_every_layer(runner, frame, codes, proposals)


def _assert_only_the_image_depends_on_the_frame(
    runner: ForcedRunner, frame: Frame, codes: Codes, proposals: NDArray[np.float32]
) -> None:
    """Another frame changes the image, and no layer that is given its inputs."""
    other = np.ascontiguousarray(255 - frame[::-1])
    forced = runner.run_forced(runner.input_of(other), codes, proposals)
    changed = [key for key, wanted in codes.items() if not np.array_equal(forced[key], wanted)]
    assert changed == [key for key in codes if key.startswith("preprocess")]


def _assert_codes_given_reach_every_layer(
    runner: ForcedRunner, frame: Frame, codes: Codes, proposals: NDArray[np.float32]
) -> None:
    """Codes that are all 0 change every layer, so each reads what it is given; proposals change RoIAlign alone."""
    array = runner.input_of(frame)
    forced = runner.run_forced(array, {key: np.zeros_like(value) for key, value in codes.items()}, proposals)
    same = [key for key, value in codes.items() if value.any() and np.array_equal(forced[key], value)]
    assert same == [key for key in codes if key.startswith("preprocess")]
    moved = runner.run_forced(array, codes, np.ascontiguousarray(proposals[::-1]))
    changed = [key.partition("@")[0] for key, value in codes.items() if not np.array_equal(moved[key], value)]
    assert changed == ["roi_heads.box_roi_pool"]
