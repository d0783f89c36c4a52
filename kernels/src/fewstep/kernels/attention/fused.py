"""Attention as custom operators with their gradient, whichever backend's kernels they launch.

The kernels read q, k and v through strides, so the packed projection is three views of one tensor, as is its gradient.
Results are (B, L, H, D) in memory: what an output projection reads. Forward-mode differentiation never comes here.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.kernels.attention import reference
from fewstep.kernels.backend import HAS_TRITON, register

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Parts = tuple[Tensor, Tensor, Tensor]
DIMS = (16, 32, 64, 72, 128)


def _kernels(backend: str) -> Any:
    return importlib.import_module(f"fewstep.kernels.attention.{backend}_kernel")


def _by_rows(x: Tensor) -> Tensor:
    """An unset tensor shaped like x (B, H, L, D), in memory (B, L, H, D)."""
    batch, heads, length, dim = x.shape
    return x.new_empty((batch, length, heads, dim)).transpose(1, 2)


def _lse_of(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def is_readable(x: Tensor) -> bool:
    """Return whether kernels can read x (B, H, L, D): rows of 16 bytes next to each other, anywhere."""
    apart = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return x.stride(-1) == 1 and all(size == 1 or stride % 8 == 0 for size, stride in apart)


def heads_of(packed: Tensor, heads: int) -> Tensor:
    """View a projection (B, L, H D) as heads (B, H, L, D)."""
    return packed.view(*packed.shape[:2], heads, packed.shape[2] // heads).transpose(1, 2)


def parts_of(qkv: Tensor, heads: int) -> Parts:
    """View a packed projection (B, L, 3 H D) as q, k and v (B, H, L, D)."""
    q, k, v = (heads_of(part, heads) for part in qkv.chunk(3, dim=-1))
    return q, k, v


@torch.library.custom_op(
    "fewstep::attention", mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale, Tensor? key_lengths, str backend) -> (Tensor, Tensor)",
)
def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T) v and the natural log-sum-exp (B, H, L) in float32."""
    o, lse = _by_rows(q), _lse_of(q)
    _kernels(backend).forward(q, k, v, o, lse, scale, key_lengths)
    return o, lse


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return _by_rows(q), _lse_of(q)


@torch.library.custom_op(
    "fewstep::attention_backward", mutates_args=(),
    schema="(Tensor d_o, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale, "
           "Tensor? key_lengths, str backend) -> (Tensor, Tensor, Tensor)",
)
def backward(
    d_o: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float,
    key_lengths: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v."""
    gradients = _by_rows(q), _by_rows(k), _by_rows(v)
    _run_backward(d_o, d_lse, (q, k, v), o, lse, gradients, scale, key_lengths, backend)
    return gradients


@backward.register_fake
def _(
    d_o: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float,
    key_lengths: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _by_rows(q), _by_rows(k), _by_rows(v)


@torch.library.custom_op(
    "fewstep::attention_qkv", mutates_args=(),
    schema="(Tensor qkv, int heads, float scale, Tensor? key_lengths, str backend) -> (Tensor, Tensor)",
)
def forward_packed(
    qkv: Tensor, heads: int, scale: float, key_lengths: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Return attention of a packed projection (B, L, 3 H D) as (B, L, H D), and its log-sum-exp (B, H, L)."""
    o, lse = _packed_results(qkv, heads)
    _kernels(backend).forward(*parts_of(qkv, heads), heads_of(o, heads), lse, scale, key_lengths)
    return o, lse


def _packed_results(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, length, width = qkv.shape
    return qkv.new_empty((batch, length, width // 3)), qkv.new_empty((batch, heads, length), dtype=torch.float32)


@forward_packed.register_fake
def _(qkv: Tensor, heads: int, scale: float, key_lengths: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return _packed_results(qkv, heads)


@torch.library.custom_op(
    "fewstep::attention_qkv_backward", mutates_args=(),
    schema="(Tensor d_o, Tensor? d_lse, Tensor qkv, Tensor o, Tensor lse, int heads, float scale, Tensor? key_lengths, "
           "str backend) -> Tensor",
)
def backward_packed(
    d_o: Tensor, d_lse: Tensor | None, qkv: Tensor, o: Tensor, lse: Tensor, heads: int, scale: float,
    key_lengths: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    """Return the gradient of the packed projection, packed."""
    d_qkv = qkv.new_empty(qkv.shape)
    _run_backward(
        heads_of(d_o, heads), d_lse, parts_of(qkv, heads), heads_of(o, heads), lse, parts_of(d_qkv, heads), scale,
        key_lengths, backend,
    )  # fmt: skip
    return d_qkv


@backward_packed.register_fake
def _(
    d_o: Tensor, d_lse: Tensor | None, qkv: Tensor, o: Tensor, lse: Tensor, heads: int, scale: float,
    key_lengths: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    return qkv.new_empty(qkv.shape)


def _run_backward(
    d_o: Tensor, d_lse: Tensor | None, qkv: Parts, o: Tensor, lse: Tensor, gradients: Parts, scale: float,
    key_lengths: Tensor | None, backend: str,
) -> None:  # fmt: skip
    d_o = d_o if is_readable(d_o) else _by_rows(d_o).copy_(d_o)
    d_lse = None if d_lse is None else d_lse.contiguous()
    _kernels(backend).backward(*qkv, o, lse, d_o, d_lse, *gradients, scale, key_lengths)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, key_lengths, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, key_lengths)


def _pull_back(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, key_lengths = ctx.saved_tensors
    if d_o is None and d_lse is None:
        return (None,) * 6
    if torch.is_grad_enabled():
        gradients = _differentiable(
            lambda q, k, v: reference.plain(q, k, v, ctx.scale, key_lengths), (q, k, v), d_o, d_lse
        )
    else:
        d_o = torch.zeros_like(o) if d_o is None else d_o
        gradients = backward(d_o, d_lse, q, k, v, o, lse, ctx.scale, key_lengths, ctx.backend)
    return *gradients, None, None, None


forward.register_autograd(_pull_back, setup_context=_keep)


def _keep_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.heads, ctx.scale, key_lengths, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, key_lengths)


def _pull_back_packed(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, o, lse, key_lengths = ctx.saved_tensors
    if d_o is None and d_lse is None:
        return (None,) * 5
    if torch.is_grad_enabled():
        (d_qkv,) = _differentiable(lambda x: _plain_packed(x, ctx.heads, ctx.scale, key_lengths), (qkv,), d_o, d_lse)
    else:
        d_o = torch.zeros_like(o) if d_o is None else d_o
        d_qkv = backward_packed(d_o, d_lse, qkv, o, lse, ctx.heads, ctx.scale, key_lengths, ctx.backend)
    return d_qkv, None, None, None, None


forward_packed.register_autograd(_pull_back_packed, setup_context=_keep_packed)


def _plain_packed(qkv: Tensor, heads: int, scale: float, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = parts_of(qkv, heads)
    o, lse = reference.plain(q, k, v, scale, key_lengths)
    return o.transpose(1, 2).flatten(2), lse


def _differentiable(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], d_o: Tensor | None, d_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients by the reference, for gradients of gradients."""
    wanted = [x for x in inputs if x.requires_grad]
    pairs = [(y, d) for y, d in zip(function(*inputs), (d_o, d_lse), strict=True) if d is not None]
    outputs, directions = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, directions, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in inputs)


def _refusal(parts: Parts, scale: float) -> str | None:
    q, k, _ = parts
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}, not bfloat16, float16 or float32"
    if q.shape[-1] not in DIMS:
        return f"head dimension {q.shape[-1]}, not one of {', '.join(map(str, DIMS))}"
    if q.numel() == 0 or k.numel() == 0:
        return "an empty tensor"
    if not all(is_readable(x) for x in parts):
        return "strides that are not multiples of 8 elements with channels next to each other"
    return None if scale > 0 else "a scale that is not positive"


def supports(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None, return_lse: bool
) -> str | None:
    """Return why the kernels cannot serve a call, or None."""
    return _refusal((q, k, v), scale)


def supports_packed(
    qkv: Tensor, heads: int, scale: float, key_lengths: Tensor | None, return_lse: bool
) -> str | None:
    """Return why the kernels cannot serve a packed call, or None."""
    return _refusal(parts_of(qkv, heads), scale)


def _register(backend: str, supports: Callable[..., str | None], supports_packed: Callable[..., str | None]) -> None:
    @register("attention", backend, supports)
    def attention(
        q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        result, lse = forward(q, k, v, scale, key_lengths, backend)
        return (result, lse) if return_lse else result

    @register("attention_qkv", backend, supports_packed)
    def attention_qkv(
        qkv: Tensor, heads: int, scale: float, key_lengths: Tensor | None, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        result, lse = forward_packed(qkv, heads, scale, key_lengths, backend)
        return (result, lse) if return_lse else result


def refusal_of_cuda(x: Tensor, *rest: Any) -> str | None:
    """Return why the CUDA kernels cannot serve a call of either form, or None."""
    if x.dtype == torch.float32:
        return "dtype torch.float32: only bfloat16 and float16"
    return supports_packed(x, *rest) if x.ndim == 3 else supports(x, *rest)


if HAS_TRITON:
    _register("triton", supports, supports_packed)
_register("cuda", refusal_of_cuda, refusal_of_cuda)
