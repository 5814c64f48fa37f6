"""What of the runner of engines can be tested without a GPU: everything up to the device, and what is read from it."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from tensorrt_runner_model import CODES, FILE_NAME, HEIGHT, WIDTH, make_artifact

from qexport.artifact import Artifact
from qexport.engines import FOLDER, add_engine, find_engine, load_engines
from qexport.errors import ArtifactError, DatasetError, TargetUnavailable
from qexport.runtimes import tensorrt
from qexport.runtimes.cuda_memory import Cuda
from qexport.runtimes.tensorrt import TensorrtRunner, build_probe, has_device, mark_outputs
from qexport.runtimes.tensorrt_builder import BuiltEngine, EngineBuilder, build_from_file, identity_here
from qexport.runtimes.tensorrt_engine import (
    LoadedEngine,
    NamedTensors,
    NumberedBindings,
    Port,
    check_ports,
    interface_of,
    is_out_of_memory,
    memory_needed,
)
from qexport.runtimes.tensorrt_execution import attach, check_input
from qexport.runtimes.tensorrt_library import TensorrtLibrary, installed_flavour, load_library
from qexport.target_options import BuildOptions

pytestmark = pytest.mark.skipif(
    installed_flavour() is None, reason="no TensorRT: pip install 'qexport[tensorrt-cpu]'"
)
without_gpu = pytest.mark.skipif(
    has_device(), reason="there is a GPU here; this is what is said where there is none"
)

FLOAT, HALF = np.dtype(np.float32), np.dtype(np.float16)
FRAME = Port("frame", (HEIGHT, WIDTH, 3), np.dtype(np.uint8), True)


@pytest.fixture(scope="module")
def library() -> TensorrtLibrary:
    return load_library()


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return make_artifact(tmp_path)


@pytest.fixture(scope="module")
def built(
    library: TensorrtLibrary, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Artifact, Path, BuiltEngine]:
    folder = tmp_path_factory.mktemp("engine")
    artifact = make_artifact(folder)
    return artifact, folder, build_from_file(library, folder, {"int8": FILE_NAME}, "int8", BuildOptions())


# Where there is no device


@without_gpu
def test_has_device_without_a_gpu_is_false() -> None:
    assert not has_device()


@without_gpu
def test_runner_without_a_gpu_says_so_and_names_the_build_on_the_device(
    artifact: Artifact, tmp_path: Path
) -> None:
    text = (
        rf"no NVIDIA GPU or driver here.*qexport build {tmp_path.name} --precision {artifact.files[0].role}"
    )
    with pytest.raises(TargetUnavailable, match=text), TensorrtRunner(tmp_path):
        pass


def test_runner_is_the_one_that_the_pipeline_finds() -> None:
    assert tensorrt.RUNNER is TensorrtRunner


def test_cuda_without_its_bindings_names_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(
        TargetUnavailable, match=r"cuda-bindings cannot be loaded.*pip install 'qexport\[device\]'"
    ):
        Cuda()


def test_cuda_call_that_fails_names_the_call_and_the_error() -> None:
    pytest.importorskip(
        "cuda.bindings.runtime", reason="no cuda-bindings here: pip install 'qexport[device]'"
    )
    with pytest.raises(TargetUnavailable, match=r"CUDA: cudaSetDevice failed with cudaError\w+: .+\."):
        Cuda().call("cudaSetDevice", 4096)


def test_cuda_make_that_fails_leaves_nothing_to_free() -> None:
    pytest.importorskip(
        "cuda.bindings.runtime", reason="no cuda-bindings here: pip install 'qexport[device]'"
    )
    freed: list[object] = []
    with ExitStack() as stack:
        with pytest.raises(TargetUnavailable, match="cudaMalloc failed with"):
            Cuda().make(stack, "cudaMalloc", "cudaFree", 2**60)
        stack.callback(freed.append, "the callback before")
    assert freed == ["the callback before"]


# Engines that do not load


def test_engine_that_was_not_built_names_the_command(
    artifact: Artifact, tmp_path: Path, library: TensorrtLibrary
) -> None:
    with pytest.raises(ArtifactError, match=r"no int8 engine\. Build it here .*qexport build"):
        find_engine(artifact, tmp_path, "int8", identity_here(library))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"library": "tensorrt 8.6.1"}, r"TensorRT tensorrt 8\.6\.1, here tensorrt"),
        ({"gpu": "Orin"}, r"GPU Orin, here "),
        ({"compute_capability": "3.5"}, r"compute capability 3\.5, here "),
    ],
    ids=["library", "gpu", "compute capability"],
)
def test_engine_of_another_machine_says_in_what_it_differs(
    built: tuple[Artifact, Path, BuiltEngine],
    library: TensorrtLibrary,
    tmp_path: Path,
    change: dict[str, str],
    said: str,
) -> None:
    artifact, source, _ = built
    folder = shutil.copytree(source, tmp_path / "carried")
    here = identity_here(library)
    assert find_engine(artifact, folder, "int8", here).is_file()
    (engine,) = load_engines(folder).engines
    other = msgspec.structs.replace(engine.built_for, **change)
    add_engine(folder, msgspec.structs.replace(engine, built_for=other))
    with pytest.raises(ArtifactError, match=rf"{said}.*\. Build it here"):
        find_engine(artifact, folder, "int8", here)


def test_engine_that_was_cut_off_is_refused_before_it_is_loaded(
    artifact: Artifact, tmp_path: Path, library: TensorrtLibrary
) -> None:
    build_from_file(library, tmp_path, {"int8": FILE_NAME}, "int8", BuildOptions())
    (engine,) = load_engines(tmp_path).engines
    path = tmp_path / FOLDER / engine.name
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"changed or cut off after its build\. Build it here"):
        find_engine(artifact, tmp_path, "int8", identity_here(library))


def test_engine_that_tensorrt_refuses_gives_its_reason_and_the_command(library: TensorrtLibrary) -> None:
    with pytest.raises(
        ArtifactError, match=r"some\.engine: tensorrt.* does not load it: .*(rror|ssert).*\. Build again"
    ):
        LoadedEngine(library, b"no engine", origin="some.engine", rebuild="Build again")


def test_ports_with_a_size_left_open_are_refused() -> None:
    ports = [FRAME, Port("boxes", (-1, 4), FLOAT, False)]
    with pytest.raises(ArtifactError, match=r"x: boxes has the shape \(-1, 4\); every size must be fixed"):
        check_ports(ports, "x")


@pytest.mark.parametrize("inputs", [0, 2])
def test_ports_with_another_number_of_inputs_are_refused(inputs: int) -> None:
    ports = [dataclasses.replace(FRAME, name=f"frame{index}") for index in range(inputs)]
    with pytest.raises(ArtifactError, match=f"has one input, the frame; this one has {inputs}"):
        check_ports(ports, "x")


# Frames


def test_several_frames_at_once_are_refused() -> None:
    frames = np.zeros((2, HEIGHT, WIDTH, 3), np.uint8)
    with pytest.raises(DatasetError, match=r"one frame at a time, given uint8 of shape \(2, 16, 16, 3\)"):
        check_input(frames, FRAME)


def test_frame_of_another_type_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"takes uint8 of shape \(16, 16, 3\).*given float32"):
        check_input(np.zeros(FRAME.shape, np.float32), FRAME)


def test_frame_of_the_engine_is_taken() -> None:
    check_input(np.zeros(FRAME.shape, np.uint8), FRAME)


# Generations of the interface


def test_interface_of_an_engine_with_both_forms_is_the_newer() -> None:
    assert isinstance(interface_of(SimpleNamespace(num_io_tensors=1, num_bindings=1)), NamedTensors)
    assert isinstance(interface_of(SimpleNamespace(num_bindings=1)), NumberedBindings)
    with pytest.raises(TargetUnavailable, match=r"neither by name .* nor by number"):
        interface_of(SimpleNamespace())


def test_named_tensors_of_a_library_without_bindings_use_nothing_that_was_removed(
    library: TensorrtLibrary,
) -> None:
    trt = library.trt
    engine = SimpleNamespace(
        num_io_tensors=2,
        get_tensor_name=("frame", "scores").__getitem__,
        get_tensor_shape={"frame": (16, 16, 3), "scores": (4,)}.__getitem__,
        get_tensor_dtype={"frame": trt.DataType.UINT8, "scores": trt.DataType.HALF}.__getitem__,
        get_tensor_mode={"frame": trt.TensorIOMode.INPUT, "scores": trt.TensorIOMode.OUTPUT}.__getitem__,
    )
    interface = interface_of(engine)
    assert interface.ports(trt, engine) == [FRAME, Port("scores", (4,), HALF, False)]
    calls: list[tuple[object, ...]] = []
    context = SimpleNamespace(
        set_tensor_address=lambda *given: calls.append(given) or True,
        execute_async_v3=lambda *given: calls.append(given) or True,
    )
    interface.bind(context, {"frame": 10, "scores": 20})
    assert interface.enqueue(context, 7)
    assert calls == [("frame", 10), ("scores", 20), (7,)]


def test_named_tensors_address_that_is_not_taken_raises_its_name() -> None:
    context = SimpleNamespace(set_tensor_address=lambda name, _: name != "scores")
    with pytest.raises(TargetUnavailable, match="tensor scores"):
        NamedTensors().bind(context, {"frame": 10, "scores": 20})


def test_numbered_bindings_go_in_the_order_of_the_engine(library: TensorrtLibrary) -> None:
    trt = library.trt
    engine = SimpleNamespace(
        num_bindings=2,
        get_binding_name=("frame", "count").__getitem__,
        get_binding_shape=((16, 16, 3), ()).__getitem__,
        get_binding_dtype=(trt.DataType.UINT8, trt.DataType.INT32).__getitem__,
        binding_is_input=(True, False).__getitem__,
    )
    interface = interface_of(engine)
    assert interface.ports(trt, engine) == [FRAME, Port("count", (), np.dtype(np.int32), False)]
    calls: list[tuple[object, ...]] = []
    context = SimpleNamespace(execute_async_v2=lambda *given: calls.append(given))
    interface.bind(context, {"frame": 10, "count": 20})
    assert not interface.enqueue(context, 7)  # TensorRT's answer is passed on
    assert calls == [([10, 20], 7)]


def test_port_of_a_type_that_numpy_does_not_have_is_refused(library: TensorrtLibrary) -> None:
    engine = SimpleNamespace(
        num_bindings=1,
        get_binding_name=lambda _: "boxes",
        get_binding_shape=lambda _: (4,),
        get_binding_dtype=lambda _: library.trt.DataType.FP8,
        binding_is_input=lambda _: False,
    )
    with pytest.raises(ArtifactError, match="boxes is of type FP8"):
        NumberedBindings().ports(library.trt, engine)


def test_memory_needed_prefers_the_newer_figure() -> None:
    assert memory_needed(SimpleNamespace(device_memory_size=1, device_memory_size_v2=2)) == 2
    assert memory_needed(SimpleNamespace(device_memory_size=1)) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)", True),
        ("Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)", True),
        ("Serialization assertion plan.header.size == blobSize failed", False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(text: str, expected: bool) -> None:
    assert is_out_of_memory(text) is expected


def test_attach_lets_a_context_report_after_the_run_where_it_can() -> None:
    newer = SimpleNamespace(profiler=None, enqueue_emits_profile=True, report_to_profiler=lambda: True)
    older = SimpleNamespace(profiler=None, enqueue_emits_profile=True)
    attach(newer, "profiler")
    attach(older, "profiler")
    assert (newer.profiler, newer.enqueue_emits_profile) == ("profiler", False)
    assert (older.profiler, older.enqueue_emits_profile) == ("profiler", True)


# A look inside


def test_probe_of_tensors_in_the_network_is_built_with_them_as_outputs(
    built: tuple[Artifact, Path, BuiltEngine], library: TensorrtLibrary
) -> None:
    _, folder, plain = built
    source = folder / FILE_NAME
    builder = EngineBuilder(library)
    network = builder.parse(source)
    before = {network.get_output(index).name for index in range(network.num_outputs)}
    mark_outputs(network, [CODES, "features", "boxes"], source)
    after = {
        network.get_output(index).name: network.get_output(index) for index in range(network.num_outputs)
    }
    assert after.keys() - before == {CODES, "features"}
    assert after[CODES].dtype == library.trt.DataType.INT8
    cache = folder / FOLDER / "timing.cache"
    assert build_probe(library, source, [CODES, "features"], cache=cache) != plain.data


def test_probe_of_a_tensor_that_is_not_there_names_it(
    artifact: Artifact, tmp_path: Path, library: TensorrtLibrary
) -> None:
    with pytest.raises(ArtifactError, match=r"no tensor nowhere \(1 of 2 are missing\)"):
        build_probe(library, tmp_path / artifact.files[0].name, [CODES, "nowhere"], cache=None)


def test_probe_of_a_file_of_another_road_says_what_is_needed(library: TensorrtLibrary) -> None:
    with pytest.raises(
        ArtifactError, match=r"detector\.int8\.network: .*an \.onnx file.*export the target `tensorrt`"
    ):
        build_probe(library, Path("detector.int8.network"), [CODES], cache=None)
