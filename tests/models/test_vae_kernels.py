"""The VAE's Triton kernels in Triton's interpreter on a CPU: arithmetic, borders and strides."""

from helpers_triton import run_interpreted

CHECK = """
import torch
import torch.nn.functional as F
from mochi_tune.models.vae_kernels import join_heads, norm_frames, split_heads

torch.manual_seed(0)
# Batch, frames, rows, columns, channels, borders; channels that are no power of 2, one pixel, several parts of a frame.
for batch, frames, rows, columns, channels, padding, silu in (
    (2, 3, 5, 7, 64, 1, True), (1, 2, 1, 1, 96, 0, False), (1, 1, 24, 40, 32, 1, True), (1, 2, 13, 11, 192, 0, True),
):
    x = torch.randn(batch, frames + 1, rows, columns, channels)[:, 1:] * 3 + 50
    weight, bias = torch.randn(channels), torch.randn(channels)
    out = torch.full((batch, frames + 2, rows + 2 * padding, columns + 2 * padding, channels), float("nan"))
    norm_frames(x, out[:, 2:], weight, bias, 32, 1e-5, silu)
    wide = F.group_norm(x.double().flatten(0, 1).movedim(-1, 1), 32, weight.double(), bias.double(), 1e-5)
    wide = F.pad(F.silu(wide) if silu else wide, (padding,) * 4, mode="replicate")
    wide = wide.movedim(1, -1).unflatten(0, (batch, -1))
    # Numbers near 50 with a standard deviation of 3: fp32 rounds them, and their mean, to 2**-19 of it.
    error = (out[:, 2:].double() - wide).abs().max() / wide.abs().max()
    assert error < 2e-5, (error, batch, frames, rows, columns, channels)
    assert out[:, :2].isnan().all(), "written beyond its frames"

# Two rows of pixels, of 5 heads of 32 channels, 3 frames; more rows than a program takes.
qkv = torch.randn(2, 3, 8, 6, 3 * 5 * 32)
q, k, v = qkv.unflatten(-1, (3, 5, 32)).permute(4, 0, 2, 3, 5, 1, 6).flatten(1, 3)
got = split_heads(qkv, 32)
assert torch.equal(got[2], v)
for ours, wanted in ((got[0], q), (got[1], k)):
    assert (ours - F.normalize(wanted.double(), dim=-1)).abs().max() < 1e-6
joined = v.unflatten(0, (2, 8, 6)).permute(0, 4, 1, 2, 3, 5).flatten(4)
assert torch.equal(join_heads(v, (2, 3, 8, 6)), joined)
print("equal")
"""


def test_they_compute_what_torch_computes():
    assert run_interpreted(CHECK) == "equal"
