"""Run a model inside torch2trt's conversion context, and let no operator get lost.

torch2trt hooks torch functions; where one has no converter, its result is taken for a constant and the engine
builds, wrong. Here each converter's arguments and each output are checked first: what depends on an input has
to have a TensorRT tensor that stands for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.compatibility import import_torch2trt
from qexport.plugins.torch2trt.data_types import held_type, tensorrt_type
from qexport.plugins.torch2trt.dotted import exists, owner_of
from qexport.plugins.torch2trt.interface import TRT_TENSOR, constant
from qexport.plugins.torch2trt.provenance import FunctionWatch, OperatorWatch, Provenance, tensors_in, where
from qexport.plugins.torch2trt.registration import Convert, Family, Operator
from qexport.plugins.torch2trt.registry import CONVERT_CONSTANTS, NOT_TO_BE_TRUSTED, converters
from qexport.runtimes.tensorrt_library import load_library, network_flags, start_builder

GUIDE = "docs/plugins.md shows how to add a converter"
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converted model; what the network was made with has to live as long as the network."""

    network: Any
    """`tensorrt.INetworkDefinition`."""
    builder: Any
    """`tensorrt.Builder`."""
    logger: Any
    """`tensorrt.ILogger`."""
    functions: Mapping[str, str]
    """The torch function that each layer was made for, by layer name."""


def convert(
    module: nn.Module,
    inputs: Sequence[Tensor],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    place: Callable[[], str] | None = None,
    extra: tuple[Operator | Family, ...] = (),
    logger: Any = None,
) -> Conversion:
    """Convert a model to a strongly typed TensorRT network.

    Args:
        module: called with the inputs; it returns a tensor or (nested) tuples of them.
        inputs: of the shapes and data types that the network will have.
        input_names: one an input.
        output_names: one an output tensor.
        place: returns the path of what is running, for names of layers and messages; None: torch2trt's own,
            the path of the module.
        extra: converters of your own; they go before ours, and ours before torch2trt's.
        logger: a `tensorrt.ILogger`; None: one that prints errors.

    Raises:
        TargetUnavailable: torch2trt or TensorRT is not installed.
        UnsupportedOperator: an operator has no converter, or its converter cannot express this call.
    """
    torch2trt = import_torch2trt()
    trt = load_library().trt
    logger = logger if logger is not None else trt.Logger(trt.Logger.ERROR)
    builder = start_builder(trt, logger)
    network = builder.create_network(network_flags(trt))
    context = _context(torch2trt, module, network, builder, logger)
    run = Run(
        context,
        network,
        {**_trusted(torch2trt), **converters(extra)},
        place if place is not None else partial(_module_path, context),
        hold_shapes=partial(_held_shapes, torch2trt),
    )
    with context:
        run.convert(module, inputs, input_names, output_names)
    return Conversion(network, builder, logger, run.functions)


class Run:
    """One conversion: converters hooked to their functions, arguments and outputs checked, layers named.

    It needs of a context what `interface.ConversionContext` says, and runs without torch2trt where something
    else gives that.
    """

    def __init__(
        self,
        context: Any,
        network: Any,
        chosen: Mapping[str, Convert],
        place: Callable[[], str],
        *,
        hold_shapes: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._context, self._network, self._chosen, self._place = context, network, chosen, place
        self._hold_shapes = hold_shapes
        self._provenance = Provenance(place)
        self._converting = False
        self._named = 0
        self._names: Counter[str] = Counter()
        self.functions: dict[str, str] = {}

    def convert(
        self,
        module: nn.Module,
        inputs: Sequence[Tensor],
        input_names: Sequence[str],
        output_names: Sequence[str],
    ) -> None:
        """Run the model and mark the network's outputs.

        Raises:
            UnsupportedOperator: something that reaches an output was not converted.
            ValueError: the model has another number of outputs than there are names.
        """
        given = [self._input(value, name) for value, name in zip(inputs, input_names, strict=True)]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for name, converter in self._chosen.items():
                self._hook(stack, name, converter)
            if self._hold_shapes is not None:
                stack.enter_context(self._hold_shapes())
            stack.enter_context(OperatorWatch(self._provenance))
            stack.enter_context(FunctionWatch(self._provenance, self._chosen.keys()))
            result = module(*given)
        outputs = list(tensors_in(result))
        if len(outputs) != len(output_names):
            raise ValueError(
                f"the model gives {len(outputs)} tensors, there are {len(output_names)} output names"
            )
        taken: set[int] = set()
        for tensor, name in zip(outputs, output_names, strict=True):
            self._output(tensor, name, taken)

    def _input(self, value: Tensor, name: str) -> Tensor:
        tensor = value.detach().clone()  # a TensorRT tensor must not stay on the caller's
        setattr(
            tensor,
            TRT_TENSOR,
            self._network.add_input(name, tensorrt_type(tensor.dtype), tuple(tensor.shape)),
        )
        self._provenance.begin(tensor, name)
        return tensor

    def _output(self, tensor: Tensor, name: str, taken: set[int]) -> None:
        self._check([tensor], f"output {name}")
        if hasattr(tensor, TRT_TENSOR):
            found = getattr(tensor, TRT_TENSOR)
        else:
            array = tensor.detach().cpu().to(held_type(tensor.dtype)).numpy()
            found = constant(_Bare(self._network), array)
        if not hasattr(tensor, TRT_TENSOR) or found.is_network_input or id(tensor) in taken:
            found = self._network.add_identity(found).get_output(0)
        taken.add(id(tensor))
        self._name_layers("", name, name)
        found.name = name
        self._network.mark_output(found)

    def _hook(self, stack: ExitStack, name: str, converter: Convert) -> None:
        """Put a converter in a function's place until the conversion ends."""
        owner, attribute = owner_of(name)
        before = vars(owner).get(attribute, _ABSENT)

        def restore() -> None:
            if before is _ABSENT:
                delattr(owner, attribute)  # inherited, as most methods of torch.Tensor
            else:
                setattr(owner, attribute, before)

        setattr(owner, attribute, self._hooked(name, getattr(owner, attribute), converter))
        stack.callback(restore)

    def _hooked(self, name: str, original: Callable[..., Any], converter: Convert) -> Callable[..., Any]:
        module, _, attribute = name.rpartition(".")

        def hooked(*args: Any, **kwargs: Any) -> Any:
            tensors = list(tensors_in((args, kwargs)))
            known = self._provenance
            if self._converting or not (
                name in CONVERT_CONSTANTS or any(known.depends(x) or known.is_current(x) for x in tensors)
            ):
                return original(*args, **kwargs)
            self._converting = True
            try:
                self._check(tensors, name)
                if _in_place(attribute):
                    self._keep_constant(args[0])
                result = original(*args, **kwargs)
                if not any(True for _ in tensors_in(result)):
                    return result  # says something of a tensor, such as its type
                result = self._call(name, converter, args, kwargs, result)
                self._forget_constants(tensors)
            finally:
                self._converting = False
            return result

        hooked.__name__, hooked.__qualname__, hooked.__module__ = attribute, attribute, module
        return hooked

    def _call(
        self, name: str, converter: Convert, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Any:
        context, place = self._context, self._place()
        context.method_args, context.method_kwargs, context.method_return = args, kwargs, result
        context.method_str = name
        try:
            converter(context)
            _check_results(context.method_return)
        except UnsupportedOperator as error:
            raise UnsupportedOperator(f"{name} in {where(place)}: {error}") from error
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise UnsupportedOperator(
                f"{name} in {where(place)}: TensorRT refused what its converter asked for ({error}); TensorRT's log "
                f"says why. {GUIDE}, which may take another way."
            ) from error
        result = context.method_return
        for tensor in tensors_in(result):
            if hasattr(tensor, TRT_TENSOR):
                self._provenance.stamp(tensor)
        self._name_layers(place, name.rpartition(".")[2].strip("_"), name)
        context.method_args = context.method_kwargs = context.method_return = None
        return result

    def _check(self, tensors: Sequence[Tensor], reader: str) -> None:
        """Refuse a tensor that depends on an input and that the network does not have.

        Raises:
            UnsupportedOperator: names the operator that no converter handled.
        """
        known = self._provenance
        for tensor in tensors:
            if known.is_current(tensor):
                continue
            if known.depends(tensor):
                origin = known.origin(tensor)
                changed = " in place" if known.is_stale(tensor) else ""
                raise UnsupportedOperator(
                    f"no converter for {origin.function} in {where(origin.path)}, which computes{changed} what "
                    f"{reader} takes: TensorRT would be given the example's numbers. Write one for "
                    f'"{origin.function}" and pass it in `extra`: {GUIDE}.'
                )
            if hasattr(tensor, TRT_TENSOR):  # a constant that an earlier conversion gave one
                delattr(tensor, TRT_TENSOR)

    def _keep_constant(self, tensor: Tensor) -> None:
        """Give a constant that is about to be written to its TensorRT tensor."""
        if not hasattr(tensor, TRT_TENSOR):
            array = tensor.detach().clone().cpu().to(held_type(tensor.dtype)).numpy()
            setattr(tensor, TRT_TENSOR, constant(_Bare(self._network), array))

    def _forget_constants(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            kept = self._provenance.depends(tensor) or self._provenance.is_current(tensor)
            if hasattr(tensor, TRT_TENSOR) and not kept:
                delattr(tensor, TRT_TENSOR)

    def _name_layers(self, path: str, short: str, function: str) -> None:
        """Name the layers that were added since the last call: `PATH/conv2d`, constants `PATH/conv2d/constant`."""
        for index in range(self._named, self._network.num_layers):
            layer = self._network.get_layer(index)
            base = "/".join(filter(None, (path, short, "constant" if layer.type.name == "CONSTANT" else "")))
            self._names[base] += 1
            number = self._names[base] - 1
            layer.name = f"{base}_{number}" if number else base
            self.functions[layer.name] = function
            # TensorRT 8.6 on: says in the engine what a fused kernel is made of.
            if hasattr(layer, "metadata"):
                layer.metadata = f"[{layer.name}]"
            for output in range(layer.num_outputs):
                tensor = layer.get_output(output)
                if tensor is not None:
                    tensor.name = f"{layer.name}/output" + (f"_{output}" if output else "")
        self._named = self._network.num_layers


@dataclass(slots=True)
class _Bare:
    """A context for layers that belong to no call."""

    network: Any
    method_args: Sequence[Any] = ()
    method_kwargs: dict[str, Any] = field(default_factory=dict)
    method_return: Any = None


def _context(torch2trt: Any, module: nn.Module, network: Any, builder: Any, logger: Any) -> Any:
    trt = load_library().trt
    return torch2trt.ConversionContext(
        network,
        converters={},  # `Run` hooks them
        torch2trt_kwargs={
            **{"module": module, "device_types": {}, "default_device_type": trt.DeviceType.GPU},
            **{"gpu_fallback": True, "int8_mode": False, "fp16_mode": False},
        },
        builder_config=builder.create_builder_config(),
        logger=logger,
    )


def _trusted(torch2trt: Any) -> dict[str, Convert]:
    """Return torch2trt's own converters, by dotted name; those that only print a warning left out."""
    named = {f"{entry['module_name']}.{entry['qual_name']}": entry for entry in torch2trt.CONVERTERS.values()}
    return {
        name: entry["converter"]
        for name, entry in named.items()
        if entry["is_real"] and name not in NOT_TO_BE_TRUSTED and exists(name)
    }


def _check_results(result: object) -> None:
    """Hold the shapes and types of a converter's TensorRT tensors against torch's.

    Raises:
        UnsupportedOperator: the converter made something else.
    """
    for tensor in tensors_in(result):
        if not hasattr(tensor, TRT_TENSOR):
            continue
        made = getattr(tensor, TRT_TENSOR)
        found, expected = (tuple(made.shape), made.dtype), (tuple(tensor.shape), tensorrt_type(tensor.dtype))
        if found != expected:
            raise UnsupportedOperator(
                f"its converter made a tensor of shape {found[0]} and type {found[1]}, torch one of shape "
                f"{expected[0]} and type {expected[1]}."
            )


def _in_place(attribute: str) -> bool:
    if attribute.startswith("__"):
        return attribute.startswith("__i") and attribute != "__invert__"
    return attribute.endswith("_")


def _module_path(context: Any) -> str:
    return str(context.current_module_name()) if context.module_stack else ""


@contextmanager
def _held_shapes(torch2trt: Any) -> Iterator[None]:
    """Keep torch2trt from making shapes part of the network: every size is fixed with the frame's."""
    patched = torch.Tensor.size
    torch.Tensor.size = torch2trt._original_size  # type: ignore[method-assign]
    try:
        with torch2trt.use_shape_wrapping(False):
            yield
    finally:
        torch.Tensor.size = patched  # type: ignore[method-assign]
