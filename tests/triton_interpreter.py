"""Make Triton's interpreter compute bfloat16, and report 32-bit offsets that overflow.

The interpreter keeps bfloat16 as uint16 and does arithmetic, comparisons and `tl.dot` on those bit
patterns; its cast from float32 truncates.  After `install()` each of these widens to float32,
computes, and rounds to nearest even, as a GPU does.  `test_interpreter.py` holds it to torch's bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# methods that compute, and whether their result has the dtype of the operands
COMPUTING = {
    "unary_op": True,
    "binary_op": True,
    "ternary_op": True,
    "create_fma": True,
    "create_erf": True,
    "create_rsqrt": True,
    "create_dot": False,
}
_installed = False


def install() -> None:
    """Patch the interpreter; a second call changes nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    for name, rounds in COMPUTING.items():
        setattr(InterpreterBuilder, name, _in_float32(getattr(InterpreterBuilder, name), rounds))
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(InterpreterBuilder, name, _cast(getattr(InterpreterBuilder, name)))
    interpreter.ReduceScanOpInterface.check_tensor = _refuse_bf16(
        interpreter.ReduceScanOpInterface.check_tensor
    )


@contextmanager
def overflow_checks() -> Iterator[None]:
    """Inside the `with` block an int32 result beyond its range raises instead of wrapping around."""
    options = interpreter.interpreter_builder.options  # a frozen dataclass
    before = options.debug
    object.__setattr__(options, "debug", True)
    try:
        yield
    finally:
        object.__setattr__(options, "debug", before)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as uint16, to float32: exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, as uint16: to nearest, ties to even; every NaN becomes the quiet one."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.reshape(values.shape))


def _is_bf16(value: object) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widened(value: object) -> object:
    return TensorHandle(widen(value.data), tl.float32) if _is_bf16(value) else value


def _in_float32(method: Callable, rounds: bool) -> Callable:
    @wraps(method)
    def computed(self, *args):
        if not any(map(_is_bf16, args)):
            return method(self, *args)
        result = method(self, *map(_widened, args))
        if rounds and result.data.dtype == np.float32:  # comparisons give bool
            return TensorHandle(narrow(result.data), tl.bfloat16)
        return result

    return computed


def _cast(method: Callable) -> Callable:
    @wraps(method)
    def cast(self, src, dst_type, *rounding_mode):
        to_bf16 = dst_type.scalar == tl.bfloat16
        if _is_bf16(src) == to_bf16:
            return src if to_bf16 else method(self, src, dst_type, *rounding_mode)
        if to_bf16:
            return TensorHandle(narrow(src.data.astype(np.float32)), tl.bfloat16)
        wide = _widened(src)
        return wide if dst_type.scalar == tl.float32 else self.cast_impl(wide, dst_type)

    return cast


def _refuse_bf16(method: Callable) -> Callable:
    @wraps(method)
    def check_tensor(self, operands):
        if any(_is_bf16(x.handle) for x in operands):
            raise TypeError("a reduction of bfloat16 has no exact model here; cast to float32 before it")
        return method(self, operands)

    return check_tensor
