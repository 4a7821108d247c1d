"""Frozen Linear layers whose weights are held in 8 bits and multiplied there, forward and backward.

Weights have one scale a row. Activations, and gradients on the way back, are rounded a row at a time when they come. On
a GPU the products run in 8 bits; elsewhere the same rounded numbers are multiplied in fp32.

torchao's linear layers for inference have no backward pass, and its training ones are slower than bf16 here: they
compute a weight's gradient and round in more steps.
"""

from typing import Any

import torch
from torch import Tensor, nn

EIGHT_BIT = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounds the rows of x (n, k) to 8 bits; returns them and their scales (n,), fp32: x is about rows * scale."""
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    x = x.float()
    # Only so that nothing is divided by 0: gradients of a loss over millions of numbers are tiny.
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / info.max
    rows = x / scale
    rows = rows.clamp(-info.max, info.max) if dtype.is_floating_point else rows.round()
    return rows.to(dtype), scale.squeeze(1)


def scaled_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns (a * a_scale) @ (b * b_scale).T in `dtype`, for 8-bit rows a (n, k) and b (m, k) and their scales."""
    if not a.is_cuda:
        # In fp32: a CPU without VNNI saturates sums of two products of int8 (oneDNN, seen with AVX2).
        product = a.float() @ b.float().t()
    elif a.dtype == torch.float8_e4m3fn:
        return torch.ops.aten._scaled_mm(a, b.t(), scale_a=a_scale[:, None], scale_b=b_scale[None], out_dtype=dtype)
    else:
        # cuBLAS takes more than 16 rows.
        padded = torch.nn.functional.pad(a, (0, 0, 0, max(0, 17 - len(a))))
        product = torch.ops.aten._int_mm(padded, b.t())[: len(a)].float()
    return (product * a_scale[:, None] * b_scale).to(dtype)


class _Product(torch.autograd.Function):
    """x @ weight.T for a frozen 8-bit weight: a gradient for x, none for the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, weight_scale)
        rows, scale = quantize_rows(x.flatten(0, -2), weight.dtype)
        return scaled_product(rows, scale, weight, weight_scale, x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        weight, weight_scale = ctx.saved_tensors
        # The weight's scales go with the numbers that are summed over: into the gradient, before it is rounded.
        rows, scale = quantize_rows(gradient.flatten(0, -2).float() * weight_scale, weight.dtype)
        transposed = weight.t().contiguous()
        ones = torch.ones(len(transposed), device=weight.device)
        product = scaled_product(rows, scale, transposed, ones, gradient.dtype)
        return product.unflatten(0, gradient.shape[:-1]), None, None


class EightBitLinear(nn.Linear):
    """A frozen Linear with its weight in 8 bits; takes an adapter as any Linear does.

    Args:
        linear: to be replaced.
        precision: "fp8" or "int8".
        stored: the weight in that precision (out, in) and its scale, () or (out, 1), where a file has it so: it is
            taken as it is, as rounding it again by each row's maximum would move it.
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
        # As bytes: others take a weight that is of a floating-point dtype for one to compute in.
        self.weight = nn.Parameter(rows.view(torch.uint8), requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out) in the dtype of x."""
        out = _Product.apply(x, self.weight.view(self.dtype_of_weight), self.weight_scale)
        return out if self.bias is None else out + self.bias

    def dequantized(self) -> Tensor:
        """Returns the weight that the products see, fp32 (out, in)."""
        return self.weight.view(self.dtype_of_weight).float() * self.weight_scale[:, None]


class Int8WeightLinear(nn.Linear):
    """A Linear with its weight held in int8, which is widened to the dtype of x for each product; without a gradient.

    For T5: a few of its activations are hundreds of times the others, which one scale a row would round to nothing.
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
