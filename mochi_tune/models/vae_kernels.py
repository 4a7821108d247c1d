"""Triton kernels for the AsymmVAE's operations between convolutions and matrix products: norms and moving of heads.

As separate operations, the same arithmetic accesses memory eight times as often. Shape letters: B batch, T frames,
H W rows and columns, C channels, which are contiguous in memory.
"""

# The arguments of a Triton launch differ from the signature of the function.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor, empty, float32

# Elements that one program of `_moments` and of `_normalize` processes at a time.
MOMENTS_BLOCK, NORMALIZE_BLOCK = 4096, 8192
# Rows that one program moves; a row is one head of one pixel.
ROWS_BLOCK = 128
# Target number of programs of `_moments` for all frames together: several for each of a GPU's about hundred
# multiprocessors. Each program has at least MIN_PIXELS pixels.
NUM_PROGRAMS, MIN_PIXELS = 1024, 64


def norm_frames(
    x: Tensor, out: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, has_silu: bool
) -> None:
    """Norms each frame of x (B, T, H, W, C) by groups of channels, in fp32, into `out` (B, T, H + 2p, W + 2p, C).

    Args:
        x: copied first if its frames are not contiguous.
        out: its frames are contiguous. If it is larger than x, the outermost rows and columns are repeated p times.
        weight: (C,).
        bias: (C,).
        num_groups: number of groups of neighbouring channels.
        eps: added to the variance.
        has_silu: whether a SiLU follows.
    """
    _, num_frames, height, width, channels = x.shape
    total = x.shape[0] * num_frames
    pixels, padding = height * width, (out.shape[2] - height) // 2
    x = x if x[0, 0].is_contiguous() else x.contiguous()
    assert out[0, 0].is_contiguous(), "a frame's pixels are not in order"
    num_parts = max(1, min(pixels // MIN_PIXELS, -(-NUM_PROGRAMS // total)))
    share = -(-pixels // num_parts)
    width_c = triton.next_power_of_2(channels)
    block = max(1, MOMENTS_BLOCK // width_c)
    moments = empty(total, num_parts, 2, channels, dtype=float32, device=x.device)
    affine = empty(total, 2, channels, dtype=float32, device=x.device)
    frames = (num_frames, x.stride(0), x.stride(1))
    _moments[(num_parts, total)](
        x, moments, *frames, pixels, share, channels, width_c, block, triton.cdiv(share, block), num_warps=4
    )
    group = channels // num_groups
    _affine[(num_groups, total)](
        moments, affine, weight, bias, pixels, share, num_parts, eps, channels, group,
        triton.next_power_of_2(group), triton.next_power_of_2(num_parts), num_warps=4,
    )  # fmt: skip
    block = max(1, NORMALIZE_BLOCK // width_c)
    num_blocks = triton.cdiv(out.shape[2] * out.shape[3], block)
    _normalize[(num_blocks, total)](
        x, affine, out, *frames, out.stride(0), out.stride(1), height, width, padding, channels, width_c, block,
        has_silu, num_warps=8,
    )  # fmt: skip


def split_heads(qkv: Tensor, head_dim: int) -> Tensor:
    """Splits qkv (B, T, H, W, 3 C) into the inputs of temporal attention, (3, B H W, heads, T, head_dim).

    Queries and keys are divided by their L2 norm, in fp32.
    Source: genmoai/mochi@0c86aeb vae/models.py (Attention, qk_norm).
    """
    batch, num_frames, height, width, channels = qkv.shape
    num_heads = channels // (3 * head_dim)
    num_rows = height * width * num_heads
    out = qkv.new_empty(3, batch * height * width, num_heads, num_frames, head_dim)
    grid = triton.cdiv(num_rows, ROWS_BLOCK), batch * num_frames
    _split_heads[grid](qkv.contiguous(), out, num_rows, num_frames, out.stride(0), num_heads, head_dim, ROWS_BLOCK)
    return out


def join_heads(attended: Tensor, size: tuple[int, int, int, int]) -> Tensor:
    """Rearranges the output of attention (B H W, heads, T, head_dim) to (B, T, H, W, C); `size` is (B, T, H, W)."""
    batch, num_frames, height, width = size
    num_heads, head_dim = attended.shape[1], attended.shape[-1]
    num_rows = height * width * num_heads
    out = attended.new_empty(*size, num_heads * head_dim)
    grid = triton.cdiv(num_rows, ROWS_BLOCK), batch * num_frames
    _join_heads[grid](attended.contiguous(), out, num_rows, num_frames, head_dim, ROWS_BLOCK)
    return out


@triton.jit
def _moments(
    x, moments, num_frames, stride_b, stride_t, pixels, share, C: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Writes the mean and the sum of squared deviations of each channel over a share of a frame's pixels.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """
    part, frame = tl.program_id(0), tl.program_id(1)
    start = (frame // num_frames).to(tl.int64) * stride_b + (frame % num_frames).to(tl.int64) * stride_t
    channel = tl.arange(0, WIDTH)
    end = tl.minimum((part + 1) * share, pixels)
    mean = tl.zeros((WIDTH,), tl.float32)
    deviation = tl.zeros((WIDTH,), tl.float32)
    count = tl.sum(tl.zeros((1,), tl.float32))
    for i in range(NUM_BLOCKS):
        first = part * share + i * BLOCK
        pixel = first + tl.arange(0, BLOCK)
        is_there = (pixel < end)[:, None] & (channel < C)[None, :]
        value = tl.load(x + start + pixel[:, None] * C + channel[None, :], mask=is_there, other=0.0).to(tl.float32)
        more = tl.minimum(tl.maximum(end - first, 0), BLOCK).to(tl.float32)
        block_mean = tl.sum(value, 0) / tl.maximum(more, 1.0)
        centred = tl.where(is_there, value - block_mean[None, :], 0.0)
        both = tl.maximum(count + more, 1.0)
        delta = block_mean - mean
        deviation += tl.sum(centred * centred, 0) + delta * delta * (count * more / both)
        mean += delta * (more / both)
        count += more
    row = moments + ((frame * tl.num_programs(0) + part) * 2) * C + channel
    tl.store(row, mean, mask=channel < C)
    tl.store(row + C, deviation, mask=channel < C)


@triton.jit
def _affine(
    moments, affine, weight, bias, pixels, share, num_parts, eps, C: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Combines the moments of one group of a frame; writes the factor and the summand that norm each channel of it."""
    group, frame = tl.program_id(0), tl.program_id(1)
    part, within = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    channel = group * GROUP + within
    is_there = (part < num_parts)[:, None] & (within < GROUP)[None, :]
    rows = moments + ((frame * num_parts + part) * 2)[:, None] * C + channel[None, :]
    means = tl.load(rows, mask=is_there, other=0.0)
    deviations = tl.load(rows + C, mask=is_there, other=0.0)
    counts = tl.minimum(tl.maximum(pixels - part * share, 0), share).to(tl.float32)[:, None]
    total = pixels.to(tl.float32) * GROUP
    mean = tl.sum(tl.sum(means * counts, 1), 0) / total
    between = tl.where(is_there, means - mean, 0.0)
    variance = tl.sum(tl.sum(deviations + counts * between * between, 1), 0) / total
    is_channel = within < GROUP
    factor = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    summand = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32) - mean * factor
    tl.store(affine + frame * 2 * C + channel, factor, mask=is_channel)
    tl.store(affine + frame * 2 * C + C + channel, summand, mask=is_channel)


@triton.jit
def _normalize(
    x, affine, out, num_frames, stride_b, stride_t, out_stride_b, out_stride_t, height, width, padding,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_SILU: tl.constexpr,
):  # fmt: skip
    """Norms a block of pixels of a padded frame; border pixels repeat the nearest pixel of x."""
    frame = tl.program_id(1)
    row, number = (frame // num_frames).to(tl.int64), (frame % num_frames).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    padded_width = width + 2 * padding
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.minimum(tl.maximum(pixel // padded_width - padding, 0), height - 1)
    z = tl.minimum(tl.maximum(pixel % padded_width - padding, 0), width - 1)
    is_there = (pixel < (height + 2 * padding) * padded_width)[:, None] & (channel < C)[None, :]
    source = row * stride_b + number * stride_t + (y * width + z)[:, None] * C + channel[None, :]
    value = tl.load(x + source, mask=is_there, other=0.0).to(tl.float32)
    factor = tl.load(affine + frame * 2 * C + channel, mask=channel < C, other=0.0)
    summand = tl.load(affine + frame * 2 * C + C + channel, mask=channel < C, other=0.0)
    value = value * factor[None, :] + summand[None, :]
    if HAS_SILU:
        value = value / (1 + tl.exp(-value))
    target = row * out_stride_b + number * out_stride_t + pixel[:, None] * C + channel[None, :]
    tl.store(out + target, value.to(out.dtype.element_ty), mask=is_there)


@triton.jit
def _split_heads(
    qkv, out, num_rows, num_frames, stride, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Moves q, k and v of a block of rows of one frame; a row is one head of one pixel."""
    frame = tl.program_id(1)
    batch, number = (frame // num_frames).to(tl.int64), frame % num_frames
    row, within = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    is_there = (row < num_rows)[:, None]
    pixel, head = row // NUM_HEADS, row % NUM_HEADS
    source = frame.to(tl.int64) * num_rows * 3 * HEAD_DIM
    source += (pixel * 3 * NUM_HEADS + head)[:, None] * HEAD_DIM + within[None, :]
    target = ((batch * num_rows + row)[:, None] * num_frames + number) * HEAD_DIM + within[None, :]
    for part in tl.static_range(3):
        value = tl.load(qkv + source + part * NUM_HEADS * HEAD_DIM, mask=is_there, other=0.0).to(tl.float32)
        if part < 2:
            length = tl.sqrt(tl.sum(value * value, 1))
            value = value / tl.maximum(length, 1e-12)[:, None]
        tl.store(out + part * stride.to(tl.int64) + target, value.to(out.dtype.element_ty), mask=is_there)


@triton.jit
def _join_heads(attended, out, num_rows, num_frames, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Moves a block of rows of one frame; a row is one head of one pixel."""
    frame = tl.program_id(1)
    batch, number = (frame // num_frames).to(tl.int64), frame % num_frames
    row, within = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    is_there = (row < num_rows)[:, None]
    source = ((batch * num_rows + row)[:, None] * num_frames + number) * HEAD_DIM + within[None, :]
    target = (frame.to(tl.int64) * num_rows + row)[:, None] * HEAD_DIM + within[None, :]
    tl.store(out + target, tl.load(attended + source, mask=is_there), mask=is_there)
