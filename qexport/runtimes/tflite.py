"""TFLite on the CPU. Needs numpy and ai-edge-litert, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qexport.runtimes.runner import OUTPUTS, Runner


class TfliteRunner(Runner):
    """Runs a TFLite artifact with XNNPACK's kernels."""

    _plain: Any
    _probe: Any

    def open(self) -> None:
        """Load the file."""
        from ai_edge_litert.interpreter import Interpreter  # noqa: PLC0415

        self._plain = Interpreter(str(self.path), num_threads=self.threads)
        self._plain.allocate_tensors()
        self._probe = None

    def close(self) -> None:
        """Free the interpreters."""
        self._plain = self._probe = None

    def run(self, array: NDArray[np.generic], tensors: Sequence[str] = ()) -> dict[str, NDArray[np.generic]]:
        """Run once."""
        session = self._plain
        if tensors:
            if self._probe is None:
                from ai_edge_litert.interpreter import Interpreter  # noqa: PLC0415

                self._probe = Interpreter(
                    str(self.path), num_threads=self.threads, experimental_preserve_all_tensors=True
                )
                self._probe.allocate_tensors()
            session = self._probe
        session.set_tensor(session.get_input_details()[0]["index"], array)
        session.invoke()
        found = {one["name"]: one["index"] for one in session.get_output_details()}
        if tensors:
            found = {one["name"]: one["index"] for one in session.get_tensor_details()} | found
        return {name: session.get_tensor(found[name]) for name in (*OUTPUTS, *tensors)}


def has_device() -> bool:
    """Say that a CPU is there."""
    return True


RUNNER = TfliteRunner
