"""Which tensors were computed from the inputs, by which function, and whether the network knows.

A converter that meets a tensor without a TensorRT tensor takes it for a constant. If the tensor came from an
operator that no converter handled, or was changed in place by one, the network then holds the example's numbers,
builds without a word and is wrong. So each operator that PyTorch runs is watched, below the functions that
converters are hooked to.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qexport.errors import UnsupportedOperator
from qexport.plugins.torch2trt.dotted import lookup, name_of
from qexport.plugins.torch2trt.interface import TRT_TENSOR

_STAMP = "_qexport_stamp"
_MADE_BY = "_qexport_made_by"
_SHAPE_ONLY = {
    *("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full"),
    *("new_empty", "new_empty_strided", "sym_size", "sym_stride", "sym_numel", "_assert_tensor_metadata"),
}
"""Operators whose result does not depend on their argument's values."""
_READERS = (
    "tolist",
    "numpy",
    "__array__",
    "__dlpack__",
    "item",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)


@dataclass(frozen=True, slots=True)
class Origin:
    """What computed a tensor."""

    function: str
    """Dotted name of the torch function."""
    path: str
    """Path of the module that called it; empty for the model itself."""


@dataclass(slots=True)
class _Memory:
    """What is known of the memory of a tensor and its views."""

    reference: StorageWeakRef
    """Keeps the address from being used again."""
    depends: bool
    """Whether what is in it was computed from an input."""
    origin: Origin
    """The last function that wrote to it."""
    written: int = 0
    """How often it was written to in place."""


class Provenance:
    """The record of one conversion."""

    def __init__(self, place: Callable[[], str]) -> None:
        self.place = place
        """Returns the path of the module that is running."""
        self.function = ""
        """Dotted name of the outermost torch function that is running."""
        self._memories: dict[int, _Memory] = {}

    def begin(self, tensor: Tensor, name: str) -> None:
        """Note an input of the network, which has its TensorRT tensor."""
        self._note(tensor, depends=True, origin=Origin(f"input {name}", ""))
        self.stamp(tensor)

    def depends(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was computed from an input."""
        memory = self._memory(tensor)
        return memory is not None and memory.depends

    def stamp(self, tensor: Tensor) -> None:
        """Note that the TensorRT tensor that a tensor has stands for what it holds now."""
        setattr(tensor, _STAMP, (self, self._written(tensor)))

    def is_current(self, tensor: Tensor) -> bool:
        """Tell whether a tensor has a TensorRT tensor of this conversion that stands for what it holds."""
        return hasattr(tensor, TRT_TENSOR) and getattr(tensor, _STAMP, None) == (self, self._written(tensor))

    def is_stale(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was written to since its TensorRT tensor was made."""
        return getattr(tensor, _STAMP, (None, 0))[0] is self and not self.is_current(tensor)

    def origin(self, tensor: Tensor) -> Origin:
        """Return what computed a tensor, or wrote to it last."""
        memory = self._memory(tensor)
        written = memory.origin if memory is not None else Origin("", "")
        made: Origin | None = getattr(tensor, _MADE_BY, None)
        return written if made is None or self.is_stale(tensor) else made

    def made(self, tensor: Tensor, function: str) -> None:
        """Note the function that returned a tensor; a view of older memory has a maker of its own."""
        setattr(tensor, _MADE_BY, Origin(function, self.place()))

    def record(
        self, operator: Any, given: Sequence[Tensor], written: Sequence[Tensor], result: object
    ) -> None:
        """Note one operator that PyTorch ran.

        Raises:
            UnsupportedOperator: it made a number of a tensor that depends on an input.
        """
        name = str(operator).partition(".")[2].partition(".")[0]
        depends = name not in _SHAPE_ONLY and any(self.depends(tensor) for tensor in given)
        results = list(tensors_in(result))
        if depends and not results and not written and result is not None:
            self.refuse_number(self.function or str(operator))
        origin = Origin(self.function or str(operator), self.place())
        for tensor in written:
            self._note(tensor, depends=depends or self.depends(tensor), origin=origin)
            self._memories[_address(tensor)].written += 1
        addresses = {_address(tensor) for tensor in (*given, *written)}
        for tensor in results:
            if _address(tensor) not in addresses:  # a view keeps what is known of its memory
                self._note(tensor, depends=depends, origin=origin)

    def refuse_number(self, function: str) -> None:
        """Refuse a Python number that depends on the image.

        Raises:
            UnsupportedOperator: always.
        """
        raise UnsupportedOperator(
            f"{function} in {where(self.place())} makes a Python number or a NumPy array of a tensor that depends "
            "on the input: the network would keep the example's. Compute it with tensors, for instance torch.where."
        )

    def _note(self, tensor: Tensor, *, depends: bool, origin: Origin) -> None:
        memory = self._memory(tensor)
        if memory is None:
            reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            self._memories[_address(tensor)] = _Memory(reference, depends, origin)
        else:
            memory.depends, memory.origin = depends, origin

    def _memory(self, tensor: Tensor) -> _Memory | None:
        return self._memories.get(_address(tensor))

    def _written(self, tensor: Tensor) -> int:
        memory = self._memory(tensor)
        return memory.written if memory is not None else 0


class OperatorWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records each operator that PyTorch runs."""

    def __init__(self, provenance: Provenance) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._provenance = provenance

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator and record it."""
        del types
        named = dict(kwargs or {})
        result = func(*args, **named)
        written = [
            tensor
            for place, parameter in enumerate(func._schema.arguments)
            if parameter.alias_info is not None and parameter.alias_info.is_write
            for tensor in tensors_in(named.get(parameter.name, args[place] if place < len(args) else None))
        ]
        self._provenance.record(func, list(tensors_in((args, named))), written, result)
        return result


class FunctionWatch(TorchFunctionMode):
    """Records the outermost torch function: the name under which a user knows an operator.

    A hooked function that the model holds under a name of its own (`from torch import relu`) is called under
    torch's, where the hook is.
    """

    def __init__(self, provenance: Provenance, hooked: Container[str]) -> None:
        super().__init__()
        self._provenance, self._hooked = provenance, hooked

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function and note what it returned."""
        del types
        named = dict(kwargs or {})
        provenance, name = self._provenance, name_of(func)
        if name.rpartition(".")[2] in _READERS and any(
            provenance.depends(tensor) for tensor in tensors_in((args, named))
        ):
            provenance.refuse_number(name)
        provenance.function = name
        try:
            result = (lookup(name) if name in self._hooked else func)(*args, **named)
        finally:
            provenance.function = ""
        given = {id(tensor) for tensor in tensors_in((args, named))}
        for tensor in tensors_in(result):
            if id(tensor) not in given:
                provenance.made(tensor, name)
        return result


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for member in value:
            yield from tensors_in(member)
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from tensors_in(member)


def _address(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return int(tensor.untyped_storage()._cdata)


def where(path: str) -> str:
    """Say in which module something happens."""
    return f"module {path}" if path else "the model itself"
