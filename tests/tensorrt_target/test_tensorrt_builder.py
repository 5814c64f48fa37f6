"""What the builder and its parser refuse: what is wrong, where, and the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from tensorrt_models import FLOAT, INT64, build, needs_builder, node, write_model, write_relu

from qexport.errors import ArtifactError, ExportError, QexportError, TargetUnavailable, UnsupportedOperator
from qexport.runtimes.tensorrt_builder import LARGEST_WINDOW, MOST_TOPK, EngineBuilder, identity_here
from qexport.runtimes.tensorrt_library import TensorrtLibrary, load_library
from qexport.target_options import BuildOptions

pytestmark = needs_builder


def non_zero(path: Path) -> Path:
    return write_model(
        path,
        [
            node("roi_heads.keep/NonZero", ["x"], ["found"]),
            node("roi_heads.keep/Cast", ["found"], ["y"], to=FLOAT),
        ],
        [("x", FLOAT, (1, 8))],
        [("y", FLOAT, (2, None))],
    )


def top_k(path: Path, count: int) -> Path:
    return write_model(
        path,
        [node("rpn.proposals/TopK", ["x", "k"], ["values", "places"])],
        [("x", FLOAT, (1, 5000))],
        [("values", FLOAT, (1, count)), ("places", INT64, (1, count))],
        {"k": np.array([count])},
    )


def pool(path: Path, operator: str, window: int) -> Path:
    return write_model(
        path,
        [node(f"backbone.pool/{operator}", ["x"], ["y"], kernel_shape=[window, window])],
        [("x", FLOAT, (1, 3, window, window))],
        [("y", FLOAT, (1, 3, 1, 1))],
    )


def roi_align(path: Path) -> Path:
    attributes = {"output_height": 7, "output_width": 7}
    return write_model(
        path,
        [node("roi_heads.box_roi_pool/RoiAlign", ["x", "boxes", "images"], ["y"], **attributes)],
        [("x", FLOAT, (1, 1, 32, 32)), ("boxes", FLOAT, (3, 4)), ("images", INT64, (3,))],
        [("y", FLOAT, (3, 1, 7, 7))],
    )


def non_max_suppression(path: Path) -> Path:
    return write_model(
        path,
        [node("rpn.proposals/NonMaxSuppression", ["boxes", "scores"], ["y"])],
        [("boxes", FLOAT, (1, 30, 4)), ("scores", FLOAT, (1, 1, 30))],
        [("y", INT64, (None, 3))],
    )


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (
            non_zero,
            r"(?s)^model\.onnx: TensorRT's parser does not take\n"
            r"  NonZero of roi_heads\.keep \(roi_heads\.keep/NonZero\): .*neither a layer nor a plugin.*replace it",
        ),
        (roi_align, r"(?s)RoiAlign of roi_heads\.box_roi_pool .*-O tensorrt\.roi_align=grid needs none"),
        (
            lambda path: pool(path, "AveragePool", 320),
            rf"(?s)AveragePool of backbone\.pool .*{LARGEST_WINDOW} positions.*export again, qexport splits",
        ),
        (
            lambda path: pool(path, "MaxPool", 320),
            rf"(?s)MaxPool of backbone\.pool .*{LARGEST_WINDOW} positions or more.*make another window smaller",
        ),
    ],
    ids=["NonZero", "RoiAlign", "AveragePool", "MaxPool"],
)
def test_parse_of_what_tensorrt_does_not_take_names_operator_module_and_way_out(
    write: Callable[[Path], Path], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedOperator, match=said):
        build(write(tmp_path / "model.onnx"))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (
            lambda path: top_k(path, MOST_TOPK + 1),
            r"(?s)built no engine:.*rpn\.proposals/TopK.*at most 3840: lower rpn_pre_nms_top_n_test",
        ),
        (non_max_suppression, r"(?s)rpn\.proposals/NonMaxSuppression.*-O tensorrt\.nms=loop"),
    ],
    ids=["TopK", "NonMaxSuppression"],
)
def test_build_of_what_the_builder_refuses_names_layer_and_way_out(
    write: Callable[[Path], Path], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=said) as caught:
        build(write(tmp_path / "model.onnx"))
    assert str(caught.value).startswith(load_library().name)


def test_build_at_the_limits_gives_an_engine(tmp_path: Path) -> None:
    for path in (top_k(tmp_path / "top.onnx", MOST_TOPK), pool(tmp_path / "pool.onnx", "MaxPool", 316)):
        built = build(path)
        assert len(built.data) > 1000
        assert built.build_s > 0
        assert built.layers


@pytest.mark.parametrize("shape", [("frames", 3, 16, 16), (1, 3, "height", "width")])
def test_parse_of_a_frame_of_no_fixed_size_is_refused(shape: tuple[Any, ...], tmp_path: Path) -> None:
    path = write_relu(tmp_path / "open.onnx", shape)
    shown = ", ".join("-1" if isinstance(size, str) else str(size) for size in shape)
    with pytest.raises(ArtifactError) as caught:
        build(path)
    assert str(caught.value).startswith(f"{path}: input x has the shape ({shown}); every size must be fixed.")
    assert "--frame HEIGHTxWIDTH" in str(caught.value)


def cut_in_half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut_in_half, "cannot read it"),
        (lambda path: path.write_text("no network"), "cannot read it"),
        (lambda path: path.write_bytes(b""), "holds no network"),
        (lambda path: path.unlink(), "no such file"),
    ],
    ids=["cut off", "text", "empty", "missing"],
)
def test_parse_of_a_damaged_file_names_it_and_says_to_export_again(
    spoil: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    path = write_relu(tmp_path / "detector.int8.onnx")
    spoil(path)
    with pytest.raises(ArtifactError, match=rf"{path}: .*{said}.*Export again\."):
        build(path)


def test_parse_of_an_operator_that_is_in_no_domain_names_it(tmp_path: Path) -> None:
    path = write_relu(tmp_path / "model.onnx")
    model = onnx.load(path)
    model.graph.node[0].op_type = "Relu9"
    onnx.save(model, path)
    with pytest.raises(UnsupportedOperator, match=r"Relu9 of backbone\.relu \(backbone\.relu/Relu\)"):
        build(path)


def test_build_of_a_batch_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(QexportError, match=r"batch 2: .*one frame at a time.*one context a frame") as caught:
        build(write_relu(tmp_path / "model.onnx"), BuildOptions(batch=2))
    assert caught.value.exit_code == 2


def test_build_for_a_dla_core_where_none_is_leaves_with_3(tmp_path: Path) -> None:
    said = r"DLA core 0 was asked for; this machine has no DLA core\(s\)\. Leave dla_core out"
    with pytest.raises(TargetUnavailable, match=said) as caught:
        build(write_relu(tmp_path / "model.onnx"), BuildOptions(dla_core=0))
    assert caught.value.exit_code == 3


def test_build_takes_the_options_of_the_builder(tmp_path: Path) -> None:
    options = BuildOptions(workspace_mb=64, optimization_level=0)
    assert build(write_relu(tmp_path / "model.onnx"), options).layers[0].nodes == ("backbone.relu/Relu",)


def test_timing_cache_of_another_tensorrt_is_begun_anew(tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"of another TensorRT")
    builder = EngineBuilder(load_library())
    builder.parse(write_relu(tmp_path / "model.onnx"))
    assert builder.build(BuildOptions(), cache=cache).data
    assert cache.read_bytes() != b"of another TensorRT"


def test_engine_built_without_a_gpu_is_bound_to_the_library_alone() -> None:
    library = load_library()
    assert identity_here(library).library == library.name == f"tensorrt_rtx {library.version}"
    assert identity_here(library).gpu == ""


# DLA cores: TensorRT 8 to 10 alone has them, and only on a Jetson. What it is told is looked at.


class Config(SimpleNamespace):
    """A builder's configuration that remembers."""

    def __init__(self) -> None:
        super().__init__(flags=[])

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)


def classic(cores: int) -> Any:
    """Return what of TensorRT 8.5's interface is asked before a build."""

    class Named:
        def __init__(self, name: str) -> None:
            self.name, self.num_outputs, self.shape = name, 1, (1, 3, 8, 8)

        def get_output(self, port: int) -> Named:
            return self

    class Network(SimpleNamespace):
        num_layers = 2

        def get_input(self, index: int) -> Named:
            return Named("frame")

        def get_layer(self, index: int) -> Named:
            return Named(("conv/output", "boxes")[index])

        def get_flag(self, flag: int) -> bool:
            return False

    class Builder:
        def __init__(self, logger: object) -> None:
            self.num_DLA_cores, self.asked = cores, []

        def create_network(self, flags: int) -> Network:
            self.asked.append(flags)
            return Network()

        def create_builder_config(self) -> Config:
            return Config()

    class Parent:
        Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)

    return SimpleNamespace(
        __version__="8.5.2.2",
        ILogger=Parent,
        Builder=Builder,
        NetworkDefinitionCreationFlag=SimpleNamespace(__members__={"EXPLICIT_BATCH": 0}),
        BuilderFlag=SimpleNamespace(INT8="int8", FP16="fp16", GPU_FALLBACK="fallback"),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        DeviceType=SimpleNamespace(DLA="dla"),
        IInt8EntropyCalibrator2=Parent,
    )


def test_build_for_a_dla_core_takes_ranges_from_the_cache_and_may_fall_back(tmp_path: Path) -> None:
    (tmp_path / "calibration.cache").write_text("TRT-8502-EntropyCalibration2\nconv/output: 3d000000\n")
    builder = EngineBuilder(TensorrtLibrary(classic(cores=2), "tensorrt"), weakly_typed=True)
    assert builder.builder.asked == [1]  # EXPLICIT_BATCH, and no strong types
    config = builder._config(BuildOptions(dla_core=1), tmp_path / "calibration.cache")
    assert (config.default_device_type, config.DLA_core) == ("dla", 1)
    assert config.flags == ["int8", "fp16", "fallback"]
    assert b"conv/output: 3d000000" in config.int8_calibrator.read_calibration_cache()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (BuildOptions(dla_core=2), r"DLA core 2 was asked for; this machine has 2 DLA core\(s\)"),
        (BuildOptions(optimization_level=3), r"^tensorrt 8\.5\.2\.2 has no optimization level; leave"),
    ],
    ids=["DLA core", "optimization level"],
)
def test_option_that_this_tensorrt_does_not_have_is_refused(options: BuildOptions, said: str) -> None:
    builder = EngineBuilder(TensorrtLibrary(classic(cores=2), "tensorrt"), weakly_typed=True)
    with pytest.raises(QexportError, match=said):
        builder._config(options, None)
