"""The learning rate of each step."""

from __future__ import annotations

import math

_LAST = 0.01
"""What is left of the peak at the last step."""


def learning_rate(step: int, *, steps: int, peak: float, warm_up: float) -> float:
    """Return the learning rate: a linear rise, then a cosine down to a hundredth of the peak.

    Args:
        step: from 0.
        steps: of the whole training.
        peak: the largest learning rate.
        warm_up: share of the steps in which it rises.
    """
    rising = math.ceil(steps * warm_up)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    done = (step - rising) / max(steps - rising - 1, 1)
    return peak * (_LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
