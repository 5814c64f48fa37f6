"""`-O TARGET.NAME=VALUE`: taken by the target that has it, refused by name and value otherwise."""

from __future__ import annotations

import pytest

from qexport.errors import QexportError
from qexport.target import TARGETS, find_target
from qexport.target_options import (
    BuildOptions,
    TargetOptions,
    TensorrtOptions,
    Torch2trtOptions,
    describe_options,
    read_options,
    split_assignment,
)
from qexport.work import check_target_options


def test_options_given_are_read_into_their_types() -> None:
    given = [
        "tensorrt.roi_align=grid",
        "tensorrt.workspace_mb=1024",
        "tensorrt.timing_cache=false",
        "tensorrt.dla_core=0",
        "torch2trt.batch=3",
    ]
    assert read_options(TensorrtOptions, "tensorrt", given) == TensorrtOptions(
        roi_align="grid", workspace_mb=1024, timing_cache=False, dla_core=0
    )
    assert read_options(Torch2trtOptions, "torch2trt", given).batch == 3
    assert read_options(TargetOptions, "onnx", given) == TargetOptions()


def test_option_given_twice_is_the_last() -> None:
    given = ["tensorrt.nms=loop", "tensorrt.nms=layer"]
    assert read_options(TensorrtOptions, "tensorrt", given).nms == "layer"


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        (
            "tensorrt.roi=grid",
            r"-O tensorrt\.roi: target tensorrt has no such option; it has workspace_mb, .*weights",
        ),
        ("onnx.roi_align=grid", r"-O onnx\.roi_align: target onnx has no such option; it has none"),
        ("tensorrt.roi_align=best", r"-O tensorrt: Invalid enum value 'best'.*roi_align.*qexport targets"),
        ("tensorrt.workspace_mb=0", r"-O tensorrt: Expected `int` >= 1.*workspace_mb"),
        ("tensorrt.optimization_level=6", r"`int` <= 5.*optimization_level"),
        ("tensorrt.workspace_mb=much", r"-O tensorrt: .*workspace_mb"),
        ("tensorrt.timing_cache=perhaps", r"-O tensorrt: .*timing_cache"),
        ("gameboy.nms=loop", r"no target 'gameboy'; there is onnx, .*tensorrt, torch2trt"),
        ("tensorrt", r"-O tensorrt: expected TARGET\.NAME=VALUE, as in tensorrt\.roi_align=grid"),
        ("roi_align=grid", "expected TARGET"),
        ("tensorrt.=grid", "expected TARGET"),
        (".nms=grid", "expected TARGET"),
    ],
)
def test_option_that_makes_no_sense_is_refused_with_what_there_is(assignment: str, said: str) -> None:
    with pytest.raises(QexportError, match=said) as caught:
        check_target_options([assignment])
    assert caught.value.exit_code == 2


def test_assignment_is_split_at_the_first_dot_and_the_first_sign() -> None:
    assert split_assignment("tensorrt.name=a=b.c") == ("tensorrt", "name", "a=b.c")


def test_every_option_says_what_it_chooses() -> None:
    for target in TARGETS:
        rows = list(describe_options(target.options))
        assert all(meaning for _, _, meaning in rows)
    rows = {name: default for name, default, _ in describe_options(find_target("tensorrt").options)}
    assert rows["roi_align"] == "auto"
    assert rows["timing_cache"] == "true"
    assert rows["workspace_mb"] == ""
    assert set(BuildOptions.__struct_fields__) < set(rows)
