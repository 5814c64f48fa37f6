"""Build TensorRT engines from ONNX files or from networks: on a workstation and on the board, without torch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexport.engines import FOLDER, DeviceIdentity, Engine, add_engine
from qexport.errors import ArtifactError, ExportError, QexportError, TargetUnavailable, UnsupportedOperator
from qexport.files import sha256_file, write_bytes
from qexport.runtimes.calibration_cache import FILE_NAME as CALIBRATION_CACHE
from qexport.runtimes.calibration_cache import cache_calibrator
from qexport.runtimes.nvidia_device import find_device
from qexport.runtimes.tensorrt_layers import LISTING, EngineLayer, parse_inspector, parse_listing
from qexport.runtimes.tensorrt_library import (
    CLASSIC,
    TensorrtLibrary,
    network_flags,
    no_collection,
    start_builder,
)
from qexport.runtimes.tensorrt_network import load_network
from qexport.runtimes.tensorrt_network_writer import write_network
from qexport.target_options import BuildOptions

MOST_TOPK = 3840
"""Largest K of TensorRT's TopK."""
LARGEST_WINDOW = 100_000
"""Positions that a window of a pool or a convolution must stay below."""
INT8, FP32 = "int8", "fp32"
TIMING_CACHE = "timing.cache"
_MEBIBYTE = 2**20
_HINTS = (
    ("K exceeds the maximum value", f"TopK takes at most {MOST_TOPK}: lower rpn_pre_nms_top_n_test."),
    (
        "maxKernelDimsProduct",
        f"a window of {LARGEST_WINDOW} positions or more: export again, qexport splits average pools; make "
        "another window smaller.",
    ),
    ("out of memory", "the device has too little memory: close what runs there, or lower workspace_mb."),
    ("OutOfMemory", "the device has too little memory: close what runs there, or lower workspace_mb."),
    ("ROIAlign plugin", "this TensorRT has no such plugin: -O tensorrt.roi_align=grid needs none."),
    ("NonMaxSuppression", "this TensorRT does not run its NMS layer: -O tensorrt.nms=loop needs none."),
    (
        "lugin",
        "this TensorRT has neither a layer nor a plugin for it: replace it in the model. What qexport exports holds "
        "none such.",
    ),
)


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """What the builder made."""

    data: bytes
    layers: tuple[EngineLayer, ...]
    """The engine's layers as the builder listed them, or as the inspector saw them."""
    build_s: float


class EngineBuilder:
    """A TensorRT builder with its log, and one network in it.

    Args:
        library: the TensorRT that builds.
        weakly_typed: let the builder choose types (DLA, TensorRT 8 to 10) where the library still can.
    """

    def __init__(self, library: TensorrtLibrary, *, weakly_typed: bool = False) -> None:
        self.library, trt = library, library.trt
        self.messages: list[tuple[Any, str]] = []
        self._logger = _collecting_logger(trt, self.messages)
        self.builder = start_builder(trt, self._logger)
        if hasattr(trt, "init_libnvinfer_plugins"):
            trt.init_libnvinfer_plugins(self._logger, "")  # the ROIAlign plugin is one of them
        self.network = self.builder.create_network(network_flags(trt, weakly_typed=weakly_typed))
        self._keep: list[Any] = []

    @property
    def logger(self) -> Any:
        """The `ILogger` that collects."""
        return self._logger

    def take(self, builder: Any, network: Any) -> None:
        """Go on with a network that was made elsewhere, with this log.

        Args:
            builder: the `IBuilder` that made it.
            network: an `INetworkDefinition`.
        """
        self.builder, self.network = builder, network

    def parse(self, path: Path) -> Any:
        """Read an ONNX file, or a network that was saved, into the network, and return it.

        Raises:
            UnsupportedOperator: TensorRT lacks an operator, named with its module path.
            ArtifactError: the file is missing or cut off, or takes frames of a size that is not fixed.
        """
        trt = self.library.trt
        if path.suffix != ".onnx":
            saved = load_network(path)
            self._keep.append(saved)  # the network reads its arrays until it is built
            write_network(trt, self.network, saved)
            return self.network
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file. Export again.")
        with no_collection():
            parser = trt.OnnxParser(self.network, self._logger)
        self._keep.append(parser)  # it owns the weights of the network
        with no_collection():
            parsed = parser.parse_from_file(str(path))
        if not parsed:
            raise _parse_error(path, [parser.get_error(index) for index in range(parser.num_errors)])
        if not self.network.num_outputs:  # TensorRT takes an empty file for an empty network
            raise ArtifactError(f"{path}: holds no network. Cut off? Export again.")
        for index in range(self.network.num_inputs):
            tensor = self.network.get_input(index)
            if any(size < 0 for size in tensor.shape):
                raise ArtifactError(
                    f"{path}: input {tensor.name} has the shape {tuple(tensor.shape)}; every size must be fixed. "
                    "Export with a fixed frame: qexport inspect --frame HEIGHTxWIDTH."
                )
        return self.network

    def build(
        self, options: BuildOptions, *, cache: Path | None = None, calibration: Path | None = None
    ) -> BuiltEngine:
        """Build the engine of the network.

        Args:
            options: of the builder.
            cache: where timings of kernels are kept; None keeps none.
            calibration: cache of ranges, for a DLA core.

        Raises:
            QexportError: an option that this TensorRT or this network cannot have.
            TargetUnavailable: a DLA core was asked for where there is none.
            ExportError: the builder refused; says what it said, and at which layer.
        """
        config = self._config(options, calibration)
        timings = self._take_timings(config, cache)
        began = time.perf_counter()
        with no_collection():
            serialized = self.builder.build_serialized_network(self.network, config)
        seconds = time.perf_counter() - began
        if serialized is None:
            raise ExportError(_refusal(self.library, self.errors()))
        data = bytes(serialized)
        if timings is not None and cache is not None:
            with _deprecations_ignored():
                kept = bytes(timings.serialize())
            write_bytes(cache, kept)
        return BuiltEngine(data, self._layers(data), round(seconds, 3))

    def errors(self) -> list[str]:
        """Return what the log says of errors."""
        severity = self.library.trt.ILogger.Severity
        return [text for level, text in self.messages if level in (severity.ERROR, severity.INTERNAL_ERROR)]

    def _config(self, options: BuildOptions, calibration: Path | None) -> Any:
        trt, config = self.library.trt, self.builder.create_builder_config()
        if options.batch != 1:
            raise QexportError(
                f"batch {options.batch}: the detector is exported for one frame at a time, and its engine has one "
                "profile, batch 1. Run one context a frame, or several processes."
            )
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if options.workspace_mb is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb * _MEBIBYTE)
        if options.optimization_level is not None:
            if not hasattr(config, "builder_optimization_level"):
                raise QexportError(f"{self.library.name} has no optimization level; leave the option out.")
            config.builder_optimization_level = options.optimization_level
        if not _is_strongly_typed(trt, self.network):
            for name in ("INT8", "FP16"):  # types stand in the network; these only allow them
                if hasattr(trt.BuilderFlag, name):
                    config.set_flag(getattr(trt.BuilderFlag, name))
        if options.dla_core is not None:
            self._choose_dla(config, options.dla_core, calibration)
        return config

    def _choose_dla(self, config: Any, core: int, calibration: Path | None) -> None:
        trt = self.library.trt
        cores = int(getattr(self.builder, "num_DLA_cores", 0))
        if core >= cores:
            raise TargetUnavailable(
                f"DLA core {core} was asked for; this machine has {cores or 'no'} DLA core(s). "
                "Leave dla_core out to run on the GPU."
            )
        if calibration is None and hasattr(trt, "IInt8EntropyCalibrator2"):
            raise QexportError(
                "a DLA core takes the ranges of a calibration cache, which this artifact does not have: build that of "
                "target tensorrt."
            )
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = core
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
        if calibration is not None and hasattr(trt, "IInt8EntropyCalibrator2"):
            names = {self.network.get_input(0).name}
            for index in range(self.network.num_layers):
                layer = self.network.get_layer(index)
                names |= {layer.get_output(port).name for port in range(layer.num_outputs)}
            config.int8_calibrator = cache_calibrator(trt, calibration, names)
            self._keep.append(config.int8_calibrator)

    def _take_timings(self, config: Any, cache: Path | None) -> Any:
        if cache is None or not hasattr(config, "create_timing_cache"):
            return None
        with _deprecations_ignored():
            timings = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
            # One of another TensorRT or GPU is not taken, and begun anew.
            if timings is None or not config.set_timing_cache(timings, False):
                timings = config.create_timing_cache(b"")
                config.set_timing_cache(timings, False)
        return timings

    def _layers(self, data: bytes) -> tuple[EngineLayer, ...]:
        texts = [text for _, text in self.messages]
        if any(text.startswith(LISTING) for text in texts):
            return parse_listing(texts)
        trt = self.library.trt
        with no_collection():
            engine = trt.Runtime(self._logger).deserialize_cuda_engine(data)
        if engine is None or not hasattr(engine, "create_engine_inspector"):
            raise TargetUnavailable(f"{self.library.name} lists the layers of no engine it built here.")
        inspector = engine.create_engine_inspector()
        return parse_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def build_from_file(
    library: TensorrtLibrary, folder: Path, files: Mapping[str, str], role: str, options: BuildOptions
) -> BuiltEngine:
    """Build the engine of one of an artifact's files and write it beside the artifact.

    Args:
        library: the TensorRT that builds.
        folder: of the artifact; the engine goes into `engines/` there.
        files: names of the artifact's files, by role.
        role: what the engine computes in. A DLA core takes ranges from the calibration cache, so its int8 engine
            is built from the float32 file.
        options: of the builder.

    Raises:
        QexportError: as `EngineBuilder.parse` and `EngineBuilder.build`.
    """
    builder = EngineBuilder(library, weakly_typed=options.dla_core is not None)
    source = FP32 if options.dla_core is not None and role == INT8 else role
    builder.parse(folder / files[source])
    return write_engine(builder, folder, files, role, source, options)


def write_engine(
    builder: EngineBuilder,
    folder: Path,
    files: Mapping[str, str],
    role: str,
    source: str,
    options: BuildOptions,
) -> BuiltEngine:
    """Build a network and write the engine with the record of what it is bound to.

    Args:
        builder: its network is complete.
        folder: of the artifact.
        files: names of the artifact's files, by role.
        role: what the engine computes in.
        source: role of the file that the network was made of.
        options: of the builder.
    """
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    cache = place / TIMING_CACHE if options.timing_cache else None
    calibration = folder / CALIBRATION_CACHE
    built = builder.build(options, cache=cache, calibration=calibration if calibration.is_file() else None)
    path = place / f"detector.{role}.engine"
    write_bytes(path, built.data)
    add_engine(
        folder,
        Engine(
            role=role,
            source=source,
            name=path.name,
            sha256=sha256_file(path),
            size_bytes=len(built.data),
            source_sha256=sha256_file(folder / files[source]),
            built_for=identity_here(builder.library),
            build_s=built.build_s,
            options=_given(options),
        ),
    )
    return built


def identity_here(library: TensorrtLibrary) -> DeviceIdentity:
    """Return what an engine that is built now is bound to."""
    device = find_device() if library.flavour == CLASSIC else None
    if device is None:
        return DeviceIdentity(library=library.name)
    return DeviceIdentity(
        library=library.name,
        gpu=device.name,
        compute_capability=device.compute_capability,
        driver=device.driver,
    )


def _given(options: BuildOptions) -> dict[str, str]:
    default = BuildOptions()
    return {
        name: str(getattr(options, name))
        for name in BuildOptions.__struct_fields__
        if getattr(options, name) != getattr(default, name)
    }


def _is_strongly_typed(trt: Any, network: Any) -> bool:
    flags = trt.NetworkDefinitionCreationFlag
    return not hasattr(trt.BuilderFlag, "INT8") or (
        hasattr(flags, "STRONGLY_TYPED") and network.get_flag(flags.STRONGLY_TYPED)
    )


@contextmanager
def _deprecations_ignored() -> Iterator[None]:
    """TensorRT for RTX has the calls of a timing cache, does nothing in them, and says that they are deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _collecting_logger(trt: Any, messages: list[tuple[Any, str]]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            messages.append((severity, text))

    return Logger()


def _parse_error(path: Path, errors: Sequence[Any]) -> QexportError:
    """Return the error of a file that the parser does not take."""
    named = []
    for error in errors:
        node = error.node_name() if hasattr(error, "node_name") else f"node {error.node()}"
        operator = error.node_operator() if hasattr(error, "node_operator") else ""
        text = str(error.desc()).strip()
        if not node and not operator:
            continue
        site = node.partition("/")[0]
        named.append(f"  {operator or 'operator'} of {site} ({node}): {text.splitlines()[0]}{_hint(text)}")
    if not named:
        said = (
            "; ".join(str(error.desc()).strip().splitlines()[0] for error in errors) or "it did not say why"
        )
        return ArtifactError(f"{path}: TensorRT's parser cannot read it ({said}). Cut off? Export again.")
    return UnsupportedOperator("\n".join([f"{path.name}: TensorRT's parser does not take", *named]))


def _refusal(library: TensorrtLibrary, errors: Sequence[str]) -> str:
    said = [text.strip() for text in errors if "Cuda Runtime" not in text][-3:] or list(errors[-1:])
    return "\n".join([f"{library.name} built no engine:", *(f"  {text}{_hint(text)}" for text in said)])


def _hint(text: str) -> str:
    return next((f"\n    {hint}" for sign, hint in _HINTS if sign in text), "")
