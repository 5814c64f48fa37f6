"""The bench's section on cost, on numbers that are known."""

from __future__ import annotations

import sys
from pathlib import Path

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

from bench_cost import Cost, cost_lines  # noqa: E402 - the tools are no package


def test_cost_lines_show_stages_memory_and_the_price_of_an_image() -> None:
    cost = Cost(
        stage_seconds={"calibrate": 10.8},
        peak_bytes={"export": 1_831_000_000},
        calibration_seconds={"8": 4.0, "16": 6.0, "32": 10.0},
    )
    page = "\n".join(cost_lines(cost))
    assert "| calibrate | 10.8 |" in page
    assert "| export | 1831 |" in page
    assert "250 ms for each further image" in page
