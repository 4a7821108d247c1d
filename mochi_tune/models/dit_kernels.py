"""Triton kernels for the DiT's operations between matrix products and attention: RMSNorm, rotary embedding, SwiGLU.

They are used in passes without gradients that are not compiled; torch.compile generates such kernels itself. Each one
reads and writes memory once, instead of six times as separate operations do, and computes in fp32.
"""

# The arguments of a Triton launch differ from the signature of the function.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

# Elements that one program processes at a time.
BLOCK = 4096


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Divides x (B, ..., D) by the root mean square of the last axis and multiplies by scale (D,) or (B, 1, D).

    x has at most three axes before the last one.
    """
    out, x = x.new_empty(x.shape), _four(x)
    (batch, rows, heads, dim), strides = x.shape, x.stride()
    scale = scale.contiguous()
    stride = dim if scale.numel() > dim else 0
    width = triton.next_power_of_2(dim)
    block = max(1, BLOCK // width)
    total = rows * heads
    _rms_norm[(triton.cdiv(total, block), batch)](
        x, scale, out, total, heads, strides[0], strides[1], strides[2], stride, eps, dim, width, block,
        num_warps=8 if width > 1024 else 4,
    )  # fmt: skip
    return out


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the even and odd channels of x (B, N, H, K) as pairs by cos and sin (N, H, K/2)."""
    x = x.contiguous()
    batch, tokens, heads, dim = x.shape
    out, total = x.new_empty(x.shape), tokens * heads
    block = max(1, BLOCK // dim)
    _rope[(triton.cdiv(total, block), batch)](x, cos.contiguous(), sin.contiguous(), out, total, dim // 2, block)
    return out


def swiglu(ab: Tensor) -> Tensor:
    """Returns SiLU(a) * b of ab (..., 2 D), [a | b]."""
    ab = ab.contiguous()
    dim = ab.shape[-1] // 2
    out = ab.new_empty(*ab.shape[:-1], dim)
    total = out.numel()
    _swiglu[(triton.cdiv(total, BLOCK // 2),)](ab, out, total, dim, BLOCK // 2)
    return out


def _four(x: Tensor) -> Tensor:
    """Returns x (B, D), (B, n, D) or (B, n, h, D) with four axes and a contiguous last axis."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    while x.ndim < 4:
        x = x.unsqueeze(-2)
    return x


@triton.jit
def _rms_norm(
    x, scale, out, total, heads, stride_b, stride_n, stride_h, scale_stride, eps, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    is_there = (row < total)[:, None] & (channel < D)[None, :]
    source = batch * stride_b + (row // heads).to(tl.int64) * stride_n + (row % heads) * stride_h
    value = tl.load(x + source[:, None] + channel[None, :], mask=is_there, other=0.0).to(tl.float32)
    factor = 1 / tl.sqrt(tl.sum(value * value, 1) / D + eps)
    scales = tl.load(scale + batch * scale_stride + channel, mask=channel < D, other=0.0).to(tl.float32)
    value = value * factor[:, None] * scales[None, :]
    target = (batch * total + row)[:, None] * D + channel[None, :]
    tl.store(out + target, value.to(out.dtype.element_ty), mask=is_there)


@triton.jit
def _rope(x, cos, sin, out, total, HALF: tl.constexpr, ROWS: tl.constexpr):
    batch = tl.program_id(1).to(tl.int64)
    row, pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF)
    is_there = (row < total)[:, None]
    angle = row.to(tl.int64)[:, None] * HALF + pair[None, :]
    c, s = tl.load(cos + angle, mask=is_there), tl.load(sin + angle, mask=is_there)
    within = tl.arange(0, 2 * HALF)
    place = (batch * total + row)[:, None] * 2 * HALF + within[None, :]
    value = tl.load(x + place, mask=is_there).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, (ROWS, HALF, 2)))
    rotated = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, 2 * HALF))
    tl.store(out + place, rotated.to(out.dtype.element_ty), mask=is_there)


@triton.jit
def _swiglu(ab, out, total, D, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    is_there = place < total
    source = place // D * 2 * D + place % D
    a = tl.load(ab + source, mask=is_there, other=0.0).to(tl.float32)
    b = tl.load(ab + source + D, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out + place, (a / (1 + tl.exp(-a)) * b).to(out.dtype.element_ty), mask=is_there)
