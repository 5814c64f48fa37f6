"""The writer: same bytes, constants once, names once, scales to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed (the extra tflite)")

from ai_edge_litert import schema_py_generated as schema
from tflite_graphs import run_file

from qexport.errors import UnsupportedOperator
from qexport.plugins.tflite.builder import TfliteBuilder
from qexport.plugins.tflite.writer import ModelWriter, Value


def model_of(data: bytes) -> Any:
    return schema.ModelT.InitFromPackedBuf(data, 0)


def name_of(tensor: Any) -> str:
    return bytes(tensor.name).decode()


def small_model() -> bytes:
    build = TfliteBuilder(ModelWriter())
    given = build.writer.tensor((2, 3), "float32", name="given")
    build.writer.place = "layer@1"
    result = build.mul(build.add(given, build.constant(np.arange(3), np.float32)), build.scalar(0.5, given))
    return build.writer.finish([given], [result], description="made here")


def test_writer_gives_the_same_bytes_for_the_same_calls() -> None:
    assert small_model() == small_model()


def test_written_file_says_what_it_is_and_runs() -> None:
    data = small_model()
    assert data[4:8] == b"TFL3"
    model = model_of(data)
    assert model.version == 3
    assert bytes(model.description) == b"made here"
    given = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(run_file(data, given)[0], [[0.5, 1.0, 1.5]] * 2)


def test_tensors_are_named_after_the_module_and_call_that_they_belong_to() -> None:
    names = {name_of(tensor) for tensor in model_of(small_model()).subgraphs[0].tensors}
    assert names == {"given", "layer@1/constant", "layer@1/constant_1", "layer@1/ADD", "layer@1/MUL"}


def test_constants_that_are_equal_are_stored_once() -> None:
    writer = ModelWriter()
    ones = np.ones((2, 2), np.int8)
    first = writer.constant(ones, scales=(0.5,))
    assert writer.constant(ones.copy(), scales=(0.5,), name="other") is first
    assert writer.constant(np.asfortranarray(ones), scales=(0.5,)) is first


@pytest.mark.parametrize(
    "other",
    [
        {"array": np.ones((2, 2), np.int8), "scales": (0.25,)},
        {"array": np.ones((2, 2), np.int8)},
        {"array": np.ones((4, 1), np.int8), "scales": (0.5,)},
        {"array": np.ones((2, 2), np.uint8), "scales": (0.5,)},
        {"array": np.ones((2, 2), np.int8) * 2, "scales": (0.5,)},
    ],
    ids=["scale", "no scale", "shape", "type", "values"],
)
def test_constants_that_differ_in_anything_are_stored_apart(other: dict[str, Any]) -> None:
    writer = ModelWriter()
    first = writer.constant(np.ones((2, 2), np.int8), scales=(0.5,))
    assert writer.constant(**other) is not first


def test_constants_with_scales_along_different_axes_are_stored_apart() -> None:
    writer = ModelWriter()
    square = np.ones((2, 2), np.int8)
    assert writer.constant(square, scales=(0.5, 1.0), axis=0) is not writer.constant(
        square, scales=(0.5, 1.0), axis=1
    )


def test_names_that_are_taken_get_a_number() -> None:
    writer = ModelWriter()
    made = [writer.tensor((1,), "float32", name="same") for _ in range(3)]
    assert [writer.name_of(value) for value in made] == ["same", "same_1", "same_2"]
    writer.rename(made[2], "same")
    assert len({writer.name_of(value) for value in made}) == 3


def test_name_that_a_tensor_gives_up_is_free_again_and_its_own_name_is_kept() -> None:
    writer = ModelWriter()
    first, second = (writer.tensor((1,), "float32", name=name) for name in ("frame", "other"))
    writer.rename(first, "frame")
    assert writer.name_of(first) == "frame"
    writer.rename(first, "elsewhere")
    writer.rename(second, "frame")
    assert writer.name_of(second) == "frame"


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 2.0**-20, 1e-7, 123.456])
def test_scales_are_stored_as_the_nearest_float32_with_zero_point_0(scale: float) -> None:
    writer = ModelWriter()
    value = writer.tensor((4,), "int8", name="codes", scales=(scale,))
    weights = writer.constant(np.ones((2, 3), np.int8), scales=(scale, scale / 7), axis=0)
    data = writer.finish([value], [weights], description="")
    one, several = (tensor.quantization for tensor in model_of(data).subgraphs[0].tensors)
    np.testing.assert_array_equal(one.scale, np.asarray([scale], np.float32))
    np.testing.assert_array_equal(several.scale, np.asarray([scale, scale / 7], np.float32))
    assert list(one.zeroPoint) == [0]
    assert list(several.zeroPoint) == [0, 0]
    assert several.quantizedDimension == 0
    assert value.scale == float(np.float32(scale))
    assert weights.scale is None


def test_operators_of_one_kind_share_a_code_and_versions_have_codes_of_their_own() -> None:
    build = TfliteBuilder(ModelWriter())
    given = build.writer.tensor((2,), "float32", name="given")
    once = build.add(given, given)
    twice = build.add(once, given)
    build.op("ADD", [once, twice], (2,), "float32", options="AddOptions", version=2)
    model = model_of(build.writer.finish([given], [twice], description=""))
    codes = [(one.builtinCode, one.version) for one in model.operatorCodes]
    assert codes == [(schema.BuiltinOperator.ADD, 1), (schema.BuiltinOperator.ADD, 2)]
    assert [one.opcodeIndex for one in model.subgraphs[0].operators] == [0, 0, 1]


def test_operator_beyond_the_old_field_says_127_there() -> None:
    build = TfliteBuilder(ModelWriter())
    given = build.writer.tensor((1, 2), "float32", name="given")
    result = build.expand(given, [3, 2])
    model = model_of(build.writer.finish([given], [result], description=""))
    (code,) = model.operatorCodes
    assert code.builtinCode == schema.BuiltinOperator.BROADCAST_TO > 127
    assert code.deprecatedBuiltinCode == 127


def test_integers_of_64_bits_become_32() -> None:
    build = TfliteBuilder(ModelWriter())
    assert build.constant([1, 2, 3], np.int64).dtype == "int32"
    given = build.writer.tensor((2,), "float32", name="given")
    assert build.cast(given, np.int64).dtype == "int32"
    assert build.cast(build.constant([1], np.int32), np.int64).dtype == "int32"


def test_integers_that_do_not_fit_into_32_bits_are_refused() -> None:
    with pytest.raises(UnsupportedOperator, match="reaches 2147483648: integers have 32 bits"):
        TfliteBuilder(ModelWriter()).constant(np.asarray([2**31]), np.int64)


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("reshape", ((2, 3),)),
        ("transpose", ((0, 1),)),
        ("slice", ((0, 0), (9, 9), (0, 1))),
        ("expand", ((2, 3),)),
    ],
)
def test_moves_that_move_nothing_are_not_written(operation: str, arguments: tuple[Any, ...]) -> None:
    build = TfliteBuilder(ModelWriter())
    given = build.writer.tensor((2, 3), "float32", name="given")
    assert getattr(build, operation)(given, *arguments) == given


def test_builder_refuses_what_tflite_has_not() -> None:
    build = TfliteBuilder(ModelWriter())
    given = build.writer.tensor((1, 2, 3, 4), "float32", name="given")
    with pytest.raises(UnsupportedOperator, match="numbers alone"):
        build.pad(given, [0, 1, 0, 0, 0, 0, 0, 0], edge=True)
    with pytest.raises(UnsupportedOperator, match="samples a map"):
        build.grid_sample(given, Value(0, (1, 2, 3, 2), "float32"))
