"""The DiT's Triton kernels in Triton's interpreter on a CPU: arithmetic and strides."""

from helpers_triton import run_interpreted

CHECK = """
import torch
import torch.nn.functional as F
from mochi_tune.models import attention, device, dit_kernels, layers

torch.manual_seed(0)


def check(got, wanted):
    assert got.shape == wanted.shape and (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


wide = lambda *tensors: [tensor.double() for tensor in tensors]
# Two rows of tokens with one scale each, of a width that is no power of 2; q of a joint projection, with one scale.
x, scale = torch.randn(2, 37, 192), torch.randn(2, 1, 192)
check(dit_kernels.rms_norm(x, scale, 1e-6), layers.rms_norm(*wide(x, scale), 1e-6))
check(dit_kernels.rms_norm(x[:, 3:20], scale[:1, 0][0], 1e-6), layers.rms_norm(*wide(x[:, 3:20], scale[0, 0]), 1e-6))
q, weight = torch.randn(2, 37, 3 * 5 * 32).unflatten(-1, (3, 5, 32)).unbind(2)[1], torch.randn(32)
check(dit_kernels.rms_norm(q, weight, 1e-5), layers.rms_norm(*wide(q, weight), 1e-5))
cos, sin = torch.randn(2, 37, 5, 16)
check(dit_kernels.apply_rope(q, cos, sin), attention.apply_rope(*wide(q, cos, sin)))
ab = torch.randn(2, 41, 2 * 80)
a, b = ab.double().chunk(2, -1)
check(dit_kernels.swiglu(ab), F.silu(a) * b)
# The interpreter launches kernels here.
assert device.triton_fault(torch.device("cpu")) == ""
print("equal")
"""


def test_they_compute_what_torch_computes():
    assert run_interpreted(CHECK) == "equal"
