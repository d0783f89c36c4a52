"""Triton's interpreter made strict: exact bf16, and an error for what would be silently wrong on a GPU.

`install()` patches `triton.runtime.interpreter` (Triton 3.6 to 3.9) for the whole process. From then on a kernel run
under TRITON_INTERPRET=1 raises `triton.runtime.errors.InterpreterError`, whose message holds one of these names:

- `Bounds`: a load or store outside every element of the tensors passed to the kernel (or in the gaps of a strided one);
- `Hazard`: one program reads or overwrites what another wrote, overwrites what another read, reads its own store
  without `tl.debug_barrier()` in between, or uses atomics, whose order would change the result's bits;
- `Unsimulated`: arithmetic on bf16 values (cast to fp32 first: the interpreter would add bit patterns), or a float32
  `tl.dot` without input_precision="ieee", which is tf32 on a GPU.

Lanes of a masked load without `other` are NaN (integers: a huge number), as they may be anything on a GPU. What this
cannot show: shared memory, tf32 and ex2.approx rounding, races between the threads of one program.
"""

from typing import Any, ClassVar

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

NOBODY, SEVERAL = -1, -2


class Bounds(AssertionError):
    pass


class Hazard(AssertionError):
    pass


class Unsimulated(AssertionError):
    pass


def widened(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) -> float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def narrowed(values: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bit patterns (uint16), to nearest, ties to even."""
    flat = np.ascontiguousarray(values, dtype=np.float32)
    bits = flat.view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(flat), np.uint16(0x7FC0), nearest).reshape(values.shape)


class Memory:
    """One storage that kernel arguments point into: which elements belong to them, and who touched each."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.first, self.size = storage.data_ptr(), tensor.element_size()
        count = storage.nbytes() // self.size
        self.owned = torch.zeros(count, dtype=torch.bool)
        self.writer, self.reader = (np.full(count, NOBODY, np.int32) for _ in range(2))
        self.epoch = np.zeros(count, np.int32)
        self.last = self.first + count * self.size

    def own(self, tensor: torch.Tensor) -> None:
        self.owned.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)

    def read(self, at: np.ndarray, program: int, epoch: int) -> None:
        writer = self.writer[at]
        if ((writer != NOBODY) & (writer != program)).any():
            raise Hazard(f"program {program} reads what another program wrote")
        if ((writer == program) & (self.epoch[at] == epoch)).any():
            raise Hazard(f"program {program} reads what it wrote without a barrier in between")
        reader = self.reader[at]
        self.reader[at] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)

    def write(self, at: np.ndarray, program: int, epoch: int) -> None:
        if np.isin(self.writer[at], (NOBODY, program), invert=True).any():
            raise Hazard(f"program {program} and another write one address")
        if np.isin(self.reader[at], (NOBODY, program), invert=True).any():
            raise Hazard(f"program {program} overwrites what another program read")
        if np.unique(at).size != at.size:
            raise Hazard(f"two lanes of program {program} write one address")
        self.writer[at], self.epoch[at] = program, epoch


class Launch:
    """The launch that is under way."""

    memories: ClassVar[dict[int, Memory]] = {}
    program: ClassVar[int] = -1
    epoch: ClassVar[int] = 0

    @classmethod
    def begin(cls, values: list[Any]) -> None:
        cls.memories, cls.program, cls.epoch = {}, -1, 0
        for value in values:
            tensor = getattr(value, "base", value) if not isinstance(value, torch.Tensor) else value
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                memory = cls.memories.setdefault(tensor.untyped_storage().data_ptr(), Memory(tensor))
                if memory.size != tensor.element_size():
                    raise Unsimulated("tensors of two element sizes share one storage")
                memory.own(tensor)

    @classmethod
    def touch(cls, pointers: TensorHandle, mask: TensorHandle, kind: str) -> None:
        address = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel().astype(np.int64)
        inside = 0
        for memory in cls.memories.values():
            here = address[(address >= memory.first) & (address < memory.last)]
            if not here.size:
                continue
            at, rest = np.divmod(here - memory.first, memory.size)
            if rest.any() or not memory.owned.numpy()[at].all():
                raise Bounds(f"program {cls.program}: {kind} outside the elements of every argument")
            getattr(memory, kind)(at, cls.program, cls.epoch)
            inside += here.size
        if inside != address.size:
            raise Bounds(f"program {cls.program}: {kind} of {address.size - inside} lanes outside every argument")


def _is_bf16(*handles: Any) -> bool:
    return any(isinstance(h, TensorHandle) and h.dtype.scalar == tl.bfloat16 for h in handles)


def _install_bf16() -> None:
    cast, dot, to_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_to_fp

    def exact_cast(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        before, after = source.dtype.scalar, target.scalar
        if before == after:
            return source
        if before == tl.bfloat16:
            wide = TensorHandle(widened(source.data), tl.float32)
            return wide if after == tl.float32 else cast(self, wide, target)
        if after == tl.bfloat16:
            return TensorHandle(narrowed(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, target)

    def exact_fp_to_fp(self: Any, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
        truncates = rounding is not None and "RTZ" in str(rounding)
        return to_fp(self, source, target, rounding) if truncates else exact_cast(self, source, target)

    def exact_dot(self: Any, a: TensorHandle, b: TensorHandle, d: Any, precision: Any, *rest: Any) -> TensorHandle:
        if _is_bf16(a, b):
            a, b = (TensorHandle(widened(h.data), tl.float32) if _is_bf16(h) else h for h in (a, b))
        elif a.dtype.scalar == tl.float32 and "IEEE" not in str(precision):
            raise Unsimulated('tl.dot of float32 is tf32 on a GPU; say input_precision="ieee"')
        return dot(self, a, b, d, precision, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = exact_cast, exact_dot
    InterpreterBuilder.create_fp_to_fp = exact_fp_to_fp
    for name in ("fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui"):
        setattr(InterpreterBuilder, f"create_{name}", lambda self, source, target: self.cast_impl(source, target))
    for name in ("binary_op", "unary_op", "create_fma", "create_clampf"):
        setattr(InterpreterBuilder, name, _refusing_bf16(getattr(InterpreterBuilder, name)))


def _refusing_bf16(operator: Any) -> Any:
    def checked(self: Any, *args: Any) -> Any:
        if _is_bf16(*args):
            raise Unsimulated("arithmetic on bf16 values; cast to float32 first")
        return operator(self, *args)

    return checked


def _unset(pointers: TensorHandle) -> TensorHandle:
    """What lanes hold that no load filled."""
    dtype = pointers.get_element_ty()
    kind = interpreter._get_np_dtype(dtype)
    if dtype == tl.bfloat16:
        value: Any = 0x7FC0
    elif kind == np.bool_:
        value = True
    else:
        value = np.nan if np.issubdtype(kind, np.floating) else np.iinfo(kind).max // 3
    return TensorHandle(np.full(pointers.data.shape, value, kind), dtype)


def _install_memory() -> None:
    begin, index = GridExecutor._init_args_hst, InterpreterBuilder.set_grid_idx
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_begin(self: Any, args: Any, kwargs: Any) -> Any:
        on_host, named = begin(self, args, kwargs)
        Launch.begin([*on_host, *named.values()])
        return on_host, named

    def checked_index(self: Any, x: int, y: int, z: int) -> None:
        Launch.program += 1
        index(self, x, y, z)

    def checked_load(self: Any, pointers: TensorHandle, mask: TensorHandle, other: Any, *rest: Any) -> TensorHandle:
        Launch.touch(pointers, mask, "read")
        if other is None and not mask.data.all():
            other = _unset(pointers)
        return load(self, pointers, mask, other, *rest)

    def checked_store(self: Any, pointers: TensorHandle, value: Any, mask: TensorHandle, *rest: Any) -> Any:
        Launch.touch(pointers, mask, "write")
        return store(self, pointers, value, mask, *rest)

    def barrier(self: Any) -> None:
        Launch.epoch += 1

    def atomic(self: Any, *args: Any) -> None:
        raise Hazard("atomics: the result would depend on the order of programs")

    GridExecutor._init_args_hst, InterpreterBuilder.set_grid_idx = checked_begin, checked_index
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = checked_load, checked_store
    InterpreterBuilder.create_barrier = barrier
    InterpreterBuilder.create_atomic_rmw = InterpreterBuilder.create_atomic_cas = atomic


def install() -> None:
    """Patch the interpreter once; a second call does nothing."""
    if not getattr(InterpreterBuilder, "is_strict", False):
        InterpreterBuilder.is_strict = True
        _install_bf16()
        _install_memory()
