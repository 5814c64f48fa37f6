"""The example of docs/plugins.md is run as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch2trt_networks import convert_model, has_torch2trt

from qexport.errors import UnsupportedOperator

GUIDE = Path(__file__).parents[3] / "docs" / "plugins.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def mish(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("mish")
    exec(compile(blocks()[0], str(GUIDE), "exec"), module.__dict__)  # noqa: S102 - the page's own code
    monkeypatch.setitem(sys.modules, "mish", module)
    return module


def test_guide_without_the_converter_conversion_raises_the_error_that_it_shows() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Mish()).eval()
    with pytest.raises(UnsupportedOperator) as raised:
        convert_model(model, torch.rand(1, 3, 8, 8))
    shown = " ".join(GUIDE.read_text("utf-8").partition("no converter for ")[2].partition("...")[0].split())
    assert " ".join(str(raised.value).split()).startswith("no converter for " + shown.replace("scores", "y0"))
    assert "docs/plugins.md" in str(raised.value)


def test_guide_converter_gives_what_the_model_gives(mish: ModuleType) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Mish(inplace=True)).eval()
    image, other = torch.rand(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    converted = convert_model(model, image, extra=(mish,))  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(converted.run(other)[0], model(other))


def test_guide_run_in_torch2trt_works_as_it_stands(mish: ModuleType) -> None:
    if not has_torch2trt():
        pytest.skip("torch2trt is not here: make torch2trt-check TORCH2TRT=path/to/checkout")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for code in blocks()[1:]:
            exec(compile(code, str(GUIDE), "exec"), {"__name__": "guide"})  # noqa: S102 - the page's own code


def test_guide_names_files_that_are_there() -> None:
    root = GUIDE.parents[1]
    named = set(re.findall(r"`((?:qexport|tests|docs)/[\w/.]+)`", GUIDE.read_text("utf-8")))
    assert named
    assert [name for name in named if not (root / name).exists()] == []
