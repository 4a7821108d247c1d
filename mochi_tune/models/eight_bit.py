"""Frozen Linear layers with 8-bit weights, multiplied in 8 bits in the forward and the backward pass.

Weights have one scale per row. Activations and gradients are quantized dynamically, also with one scale per row. On a
GPU the products run in 8 bits; on other devices the same quantized numbers are multiplied in fp32.

torchao's Linear layers for inference have no backward pass, and its layers for training are slower than bf16 here: they
compute the gradient of the weight and quantize in more steps.
"""

from typing import Any

import torch
from torch import Tensor, nn

EIGHT_BIT = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantizes the rows of x (n, k) to 8 bits; returns them and their fp32 scales (n,), so that x ~ rows * scale."""
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    x = x.float()
    # The minimum only avoids a division by 0. It is far below the tiny gradients of a loss over millions of numbers.
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / info.max
    rows = x / scale
    rows = rows.clamp(-info.max, info.max) if dtype.is_floating_point else rows.round()
    return rows.to(dtype), scale.squeeze(1)


def scaled_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns (a * a_scale) @ (b * b_scale).T in `dtype` for 8-bit a (n, k) and b (m, k) with scales (n,) and (m,)."""
    if not a.is_cuda:
        # In fp32: a CPU without VNNI saturates sums of two products of int8 (oneDNN, seen with AVX2).
        product = a.float() @ b.float().t()
    elif a.dtype == torch.float8_e4m3fn:
        return torch.ops.aten._scaled_mm(a, b.t(), scale_a=a_scale[:, None], scale_b=b_scale[None], out_dtype=dtype)
    else:
        # cuBLAS requires more than 16 rows.
        padded = torch.nn.functional.pad(a, (0, 0, 0, max(0, 17 - len(a))))
        product = torch.ops.aten._int_mm(padded, b.t())[: len(a)].float()
    return (product * a_scale[:, None] * b_scale).to(dtype)


class _Product(torch.autograd.Function):
    """Computes x @ weight.T for a frozen 8-bit weight, with a gradient for x and none for the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, weight_scale)
        rows, scale = quantize_rows(x.flatten(0, -2), weight.dtype)
        return scaled_product(rows, scale, weight, weight_scale, x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        weight, weight_scale = ctx.saved_tensors
        # This product sums over the rows of the weight, so their scales go into the gradient before it is quantized.
        rows, scale = quantize_rows(gradient.flatten(0, -2).float() * weight_scale, weight.dtype)
        transposed = weight.t().contiguous()
        ones = torch.ones(len(transposed), device=weight.device)
        product = scaled_product(rows, scale, transposed, ones, gradient.dtype)
        return product.unflatten(0, gradient.shape[:-1]), None, None


class EightBitLinear(nn.Linear):
    """A frozen Linear with its weight in 8 bits; adapters attach to it as to any Linear.

    Args:
        linear: the layer that it replaces.
        precision: "fp8" or "int8".
        stored: the 8-bit weight (out, in) of a checkpoint and its scale, () or (out, 1). If its dtype is that of
            `precision` it is used unchanged, because quantizing it again with scales per row would change its values.
    """

    def __init__(self, linear: nn.Linear, precision: str, stored: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.dtype_of_weight = EIGHT_BIT[precision]
        if stored is not None and stored[0].dtype == self.dtype_of_weight:
            device = linear.weight.device
            rows = stored[0].to(device)
            scale = stored[1].to(device).expand(len(rows), 1).reshape(len(rows)).clone()
        else:
            rows, scale = quantize_rows(linear.weight.detach(), self.dtype_of_weight)
        # Stored as bytes: other code computes in the dtype of a weight if that is a floating-point dtype.
        self.weight = nn.Parameter(rows.view(torch.uint8), requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out) in the dtype of x."""
        out = _Product.apply(x, self.weight.view(self.dtype_of_weight), self.weight_scale)
        return out if self.bias is None else out + self.bias


class Int8WeightLinear(nn.Linear):
    """A Linear with an int8 weight that is converted to the dtype of x for each product; the weight has no gradient.

    For T5: a few of its activations are hundreds of times larger than the others, which would become 0 if each row of
    activations were quantized with one scale.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        rows, scale = quantize_rows(linear.weight.detach(), torch.int8)
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out) in the dtype of x."""
        out = nn.functional.linear(x, self.weight.to(x.dtype)) * self.weight_scale.to(x.dtype)
        return out if self.bias is None else out + self.bias
