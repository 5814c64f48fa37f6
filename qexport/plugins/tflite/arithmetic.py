"""Write TFLite operators that take numbers one by one: arithmetic and comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from qexport.errors import UnsupportedOperator
from qexport.plugins.operations import Dtype, Shared
from qexport.plugins.tflite.writer import ModelWriter, Value


class ArithmeticBuilder:
    """Adds operators to a model; each method returns its result."""

    def __init__(self, writer: ModelWriter) -> None:
        self.writer = writer

    def op(
        self,
        code: str,
        inputs: Sequence[Value | None],
        shape: Sequence[int],
        dtype: str,
        *,
        scale: float | None = None,
        options: str = "",
        name: str = "",
        version: int = 1,
        settings: Mapping[str, object] | None = None,
    ) -> Value:
        """Add an operator with one result.

        Args:
            code: `CONV_2D`.
            inputs: in the operator's order.
            shape: of the result.
            dtype: of the result.
            scale: of int8 results.
            options: name of its table of options.
            name: of the result; by default after the operator.
            version: of the operator.
            settings: fields of the table of options.
        """
        own = name or f"{self.writer.place or 'detector'}/{code}"
        result = self.writer.tensor(shape, dtype, name=own, scales=() if scale is None else (scale,))
        self.writer.operator(code, inputs, [result], options=options, settings=settings, version=version)
        return result

    def constant(self, value: ArrayLike, dtype: Dtype) -> Value:
        """Return a constant; int64 becomes int32.

        Raises:
            UnsupportedOperator: an integer has more than 32 bits.
        """
        array = np.asarray(value, dtype)
        if array.dtype == np.int64:
            narrow = array.astype(np.int32)
            if not np.array_equal(narrow, array):
                raise UnsupportedOperator(
                    f"a constant of {self.writer.place or 'the model'} reaches {int(np.abs(array).max())}: integers "
                    "have 32 bits in TFLite."
                )
            array = narrow
        return self.writer.constant(array)

    def integers(self, *numbers: int) -> Shared[Value]:
        """Return integers for several operations to take."""
        return Shared(numbers)

    def scalar(self, number: float, like: Value) -> Value:
        """Return a number in the type of another value."""
        return self.writer.constant(np.asarray(number, like.dtype))

    # Arithmetic

    def add(self, first: Value, second: Value) -> Value:
        """Return the sum."""
        return self._binary("ADD", first, second, options="AddOptions")

    def sub(self, first: Value, second: Value) -> Value:
        """Return the difference."""
        return self._binary("SUB", first, second, options="SubOptions")

    def mul(self, first: Value, second: Value) -> Value:
        """Return the product."""
        return self._binary("MUL", first, second, options="MulOptions")

    def div(self, first: Value, second: Value) -> Value:
        """Return the quotient."""
        return self._binary("DIV", first, second, options="DivOptions")

    def minimum(self, first: Value, second: Value) -> Value:
        """Return the smaller of each pair."""
        return self._binary("MINIMUM", first, second, options="MaximumMinimumOptions")

    def maximum(self, first: Value, second: Value) -> Value:
        """Return the larger of each pair."""
        return self._binary("MAXIMUM", first, second, options="MaximumMinimumOptions")

    def remainder(self, first: Value, second: Value) -> Value:
        """Return the remainder, of the divisor's sign."""
        return self._binary("FLOOR_MOD", first, second, options="FloorModOptions")

    def clip(self, value: Value, low: float | None, high: float | None) -> Value:
        """Return the value, at least `low` and at most `high`."""
        if low is not None:
            value = self.maximum(value, self.scalar(low, value))
        return value if high is None else self.minimum(value, self.scalar(high, value))

    def unary(self, code: str, value: Value, *, options: str = "") -> Value:
        """Return a function of each element, of the same type."""
        return self.op(code, [value], value.shape, value.dtype, options=options)

    def floor(self, value: Value) -> Value:
        """Return the largest integer that is not above."""
        return self.unary("FLOOR", value)

    def log(self, value: Value) -> Value:
        """Return the natural logarithm, minus infinity of zero."""
        return self.unary("LOG", value)

    def sqrt(self, value: Value) -> Value:
        """Return the square root."""
        return self.unary("SQRT", value)

    def exp(self, value: Value) -> Value:
        """Return e to the power of each element."""
        return self.unary("EXP", value, options="ExpOptions")

    def absolute(self, value: Value) -> Value:
        """Return the magnitude."""
        return self.unary("ABS", value, options="AbsOptions")

    # Comparisons

    def equal(self, first: Value, second: Value) -> Value:
        """Return where they are equal, bool."""
        return self._binary("EQUAL", first, second, "bool", options="EqualOptions")

    def greater(self, first: Value, second: Value) -> Value:
        """Return where the first is greater, bool."""
        return self._binary("GREATER", first, second, "bool", options="GreaterOptions")

    def greater_or_equal(self, first: Value, second: Value) -> Value:
        """Return where the first is not less, bool."""
        return self._binary("GREATER_EQUAL", first, second, "bool", options="GreaterEqualOptions")

    def less(self, first: Value, second: Value) -> Value:
        """Return where the first is less, bool."""
        return self._binary("LESS", first, second, "bool", options="LessOptions")

    def less_or_equal(self, first: Value, second: Value) -> Value:
        """Return where the first is not greater, bool."""
        return self._binary("LESS_EQUAL", first, second, "bool", options="LessEqualOptions")

    def logical_and(self, first: Value, second: Value) -> Value:
        """Return where both hold, bool."""
        return self._binary("LOGICAL_AND", first, second, options="LogicalAndOptions")

    def logical_or(self, first: Value, second: Value) -> Value:
        """Return where one holds, bool."""
        return self._binary("LOGICAL_OR", first, second, options="LogicalOrOptions")

    def logical_not(self, value: Value) -> Value:
        """Return where it does not hold, bool."""
        return self.unary("LOGICAL_NOT", value, options="LogicalNotOptions")

    def where(self, condition: Value, first: Value, second: Value) -> Value:
        """Return the first where the condition holds, else the second."""
        shape = np.broadcast_shapes(condition.shape, first.shape, second.shape)
        return self.op("SELECT_V2", [condition, first, second], shape, first.dtype, options="SelectV2Options")

    def _binary(self, code: str, first: Value, second: Value, dtype: str = "", *, options: str) -> Value:
        shape = np.broadcast_shapes(first.shape, second.shape)
        return self.op(code, [first, second], shape, dtype or first.dtype, options=options)
