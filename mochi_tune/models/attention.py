"""Joint attention of visual and text tokens, its parameter-free core, and the rotary embedding.

Shape letters: B batch, N visual tokens, L text tokens, H heads, K width of a head, T R C the token grid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mochi_tune.models.device import uses_triton
from mochi_tune.models.layers import RMSNorm, at_least_fp32


def token_positions(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Returns the position (N, 3) of each visual token on the axes t, row, column.

    Rows and columns are centred and scaled so that the frame's area is that of 192 x 192 tokens.
    Source: genmoai/mochi@0c86aeb dit/joint_model/rope_mixed.py (create_position_matrix).
    """
    num_frames, rows, columns = grid
    scale = (192 * 192 / (rows * columns)) ** 0.5
    t = torch.arange(num_frames, dtype=torch.float32, device=device)
    row = (torch.arange(rows, dtype=torch.float32, device=device) + 0.5 - rows / 2) * scale
    column = (torch.arange(columns, dtype=torch.float32, device=device) + 0.5 - columns / 2) * scale
    return torch.stack(torch.meshgrid(t, row, column, indexing="ij"), dim=-1).flatten(0, 2)


def rope_tables(frequencies: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Returns cos and sin (N, H, K/2), fp32, of the mixed-axis angles for learned frequencies (3, H, K/2).

    Source: genmoai/mochi@0c86aeb dit/joint_model/rope_mixed.py (compute_mixed_rotation).
    """
    positions = token_positions(grid, frequencies.device)
    with torch.autocast(frequencies.device.type, enabled=False):
        angles = torch.einsum("na,ahk->nhk", positions, frequencies.float())
    return angles.cos(), angles.sin()


class RotaryTables(nn.Module):
    """`rope_tables` as a module without parameters, so that a forward hook can change its output."""

    def forward(self, frequencies: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Returns cos and sin (N, H, K/2), fp32."""
        return rope_tables(frequencies, grid)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the even and odd channels of x (B, N, H, K) as pairs, in fp32; the output keeps the input's dtype.

    Source: genmoai/mochi@0c86aeb dit/joint_model/temporal_rope.py (apply_rotary_emb_qk_real).
    """
    if uses_triton(x) and x.shape[-1].bit_count() == 1:
        from mochi_tune.models import dit_kernels

        return dit_kernels.apply_rope(x, cos, sin)
    pairs = at_least_fp32(x).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # One formula for both channels of a pair: with a stack of two formulas, the compiler computes both per channel.
        signs = torch.arange(-1, 2, 2, dtype=pairs.dtype, device=x.device)
        return (pairs * cos[..., None] + pairs.flip(-1) * (sin[..., None] * signs)).flatten(-2).to(x.dtype)
    even, odd = pairs.unbind(-1)
    if torch.is_grad_enabled():
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return rotated.flatten(-2).to(x.dtype)
    # The same arithmetic, written directly into the output.
    rotated = torch.empty_like(pairs, memory_format=torch.contiguous_format)
    left, right = rotated.unbind(-1)
    torch.mul(even, cos, out=left).sub_(odd * sin)
    torch.mul(even, sin, out=right).add_(odd * cos)
    return rotated.flatten(-2).to(x.dtype)


class JointAttention(nn.Module):
    """Softmax attention over [visual | valid text tokens], without parameters, so that it can be replaced."""

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor,
        v_x: Tensor,
        q_y: Tensor | None,
        k_y: Tensor,
        v_y: Tensor,
        text_lengths: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends every query to all visual tokens and to the valid text tokens of the same row.

        Padding is left out: row i has N + text_lengths[i] keys. If the lengths differ, rows are attended one by one.
        This needs no mask, so every row runs the fastest kernel, and its result is that of the row alone.

        Args:
            q_x, k_x, v_x: visual, (B, N, H, K).
            q_y: text, (B, L, H, K), or None if the text stream is not updated.
            k_y, v_y: text, (B, L, H, K).
            text_lengths: number of valid tokens of each row, at most L. Valid tokens come first. None: all L are valid.

        Returns:
            The visual output (B, N, H * K) and the text output (B, L, H * K), which is zero for padding, or None
            without q_y.
        """
        if text_lengths is not None:
            rows = []
            for i, length in enumerate(text_lengths):
                row = slice(i, i + 1)
                own_q_y = None if q_y is None else q_y[row, :length]
                # Not a call of the module: DeepSpeed's ZeRO-3 requires the same number of calls in all processes.
                out_x, out_y = self.forward(
                    q_x[row], k_x[row], v_x[row], own_q_y, k_y[row, :length], v_y[row, :length], None
                )
                rows.append((out_x, None if out_y is None else F.pad(out_y, (0, 0, 0, k_y.shape[1] - length))))
            x = torch.cat([row[0] for row in rows])
            return x, None if q_y is None else torch.cat([row[1] for row in rows])
        num_visual = q_x.shape[1]
        q = q_x if q_y is None else torch.cat([q_x, q_y], dim=1)
        k = torch.cat([k_x, k_y], dim=1)
        v = torch.cat([v_x, v_y], dim=1)
        out = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), num_visual)
        out = out.transpose(1, 2).flatten(2)
        if q_y is None:
            return out, None
        return out[:, :num_visual], out[:, num_visual:]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, num_visual: int) -> Tensor:
        """Attends all queries (B, H, ., K) to all keys. The first `num_visual` of both are visual."""
        return F.scaled_dot_product_attention(q, k, v)


class AsymmetricAttention(nn.Module):
    """Joint self-attention of both streams, each with its own projections and width.

    Source: genmoai/mochi@0c86aeb dit/joint_model/asymm_models_joint.py (AsymmetricAttention).
    """

    def __init__(self, dim_x: int, dim_y: int, num_heads: int, update_y: bool, qkv_bias: bool, out_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.update_y = update_y
        head_dim = dim_x // num_heads
        self.qkv_x = nn.Linear(dim_x, 3 * dim_x, bias=qkv_bias)
        # Text tokens are projected to the visual width, in which both streams attend.
        self.qkv_y = nn.Linear(dim_y, 3 * dim_x, bias=qkv_bias)
        self.q_norm_x = RMSNorm(head_dim)
        self.k_norm_x = RMSNorm(head_dim)
        self.q_norm_y = RMSNorm(head_dim)
        self.k_norm_y = RMSNorm(head_dim)
        self.proj_x = nn.Linear(dim_x, dim_x, bias=out_bias)
        if update_y:
            self.proj_y = nn.Linear(dim_x, dim_y, bias=out_bias)
        self.core = JointAttention()

    def forward(
        self, x: Tensor, y: Tensor, rope: tuple[Tensor, Tensor], text_lengths: Sequence[int] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Maps normed streams x (B, N, Dx) and y (B, L, Dy) to their attention outputs; y's is None if not updated."""
        q_x, k_x, v_x = self.qkv_x(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q_y, k_y, v_y = self.qkv_y(y).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q_x = apply_rope(self.q_norm_x(q_x), *rope)
        k_x = apply_rope(self.k_norm_x(k_x), *rope)
        q_y = self.q_norm_y(q_y) if self.update_y else None
        out_x, out_y = self.core(q_x, k_x, v_x, q_y, self.k_norm_y(k_y), v_y, text_lengths)
        return self.proj_x(out_x), self.proj_y(out_y) if self.update_y else None
