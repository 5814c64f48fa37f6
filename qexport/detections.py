"""What a detector says of one image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """Detections of one image, best first.

    boxes: (N, 4) float32, xyxy, pixels of the image that `pixels_of` names when it is passed on: the camera
        frame as a runner returns it, the original image once `Frame.to_original` was applied.
    scores: (N,) float32 in 0..1.
    labels: (N,) int64, 1 and above; 0 is the background and never appears.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)
