"""8-bit Linear layers: rounding to 8 bits is the only error, in the forward and the backward pass."""

import pytest
import torch
from helpers_eight_bit import dequantized
from helpers_golden import TOLERANCE, relative_error

from mochi_tune.models.eight_bit import EIGHT_BIT, EightBitLinear, Int8WeightLinear, quantize_rows

# Half the distance of neighbouring numbers, relative to the larger one (fp8) or to the largest of the row (int8).
STEP = {"fp8": 2**-4, "int8": 0.5 / 127}


@pytest.fixture(params=EIGHT_BIT)
def precision(request) -> str:
    return request.param


def rounded(x: torch.Tensor, precision: str) -> torch.Tensor:
    """Returns x with its rows rounded, fp64."""
    rows, scale = quantize_rows(x, EIGHT_BIT[precision])
    return rows.double() * scale.double()[:, None]


def test_rows_are_off_by_half_a_step_and_keep_their_largest_number(precision):
    x = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50)[:, None]
    error, largest = (rounded(x, precision) - x).abs(), x.abs().amax(1, keepdim=True)
    # Numbers of e4m3 below 2^-6 (its maximum is 448) are evenly spaced.
    bound = (x.abs() if precision == "fp8" else largest) * STEP[precision] + largest * 2**-10 / 448
    assert (error <= bound * (1 + 1e-6)).all()
    at_largest = error.gather(1, x.abs().argmax(1, keepdim=True))
    assert (at_largest <= 1e-6 * largest).all()
    assert not rounded(torch.zeros(2, 3), precision).any()


def test_tiny_gradients_are_rounded_as_large_ones(precision):
    generator = torch.Generator().manual_seed(2)
    made = EightBitLinear(torch.nn.Linear(96, 64, bias=False), precision)
    x = torch.randn(5, 96, generator=generator, requires_grad=True)
    gradient = torch.randn(5, 64, generator=generator)
    # A loss over millions of numbers has such small gradients. A power of two changes no rounding.
    usual, tiny = (torch.autograd.grad(made(x), x, gradient * scale)[0] for scale in (1, 2**-50))
    assert torch.equal(tiny * 2**50, usual)


@pytest.mark.parametrize("has_bias", [True, False])
def test_products_and_gradients_are_those_of_the_rounded_numbers(precision, has_bias):
    generator = torch.Generator().manual_seed(1)
    linear = torch.nn.Linear(96, 64, bias=has_bias)
    linear.weight.data = torch.randn(64, 96, generator=generator) * torch.logspace(-2, 2, 64)[:, None]
    made = EightBitLinear(linear, precision)
    x = torch.randn(2, 5, 96, generator=generator, requires_grad=True)
    gradient = torch.randn(2, 5, 64, generator=generator)
    out = made(x)
    out.backward(gradient)
    weight = rounded(linear.weight.detach(), precision)
    assert relative_error(dequantized(made), weight) <= 1e-6
    expected = rounded(x.detach().flatten(0, 1), precision) @ weight.t()
    if has_bias:
        expected = expected + linear.bias.detach()
    assert relative_error(out.detach().flatten(0, 1), expected) <= TOLERANCE
    # The gradient is multiplied by the scales of the weight's rows before it is rounded.
    rows, scale = quantize_rows(linear.weight.detach(), EIGHT_BIT[precision])
    expected = rounded(gradient.flatten(0, 1) * scale, precision) @ rows.double()
    assert relative_error(x.grad.flatten(0, 1), expected) <= TOLERANCE
    assert not [name for name, parameter in made.named_parameters() if parameter.requires_grad and name != "bias"]


def test_the_weight_takes_a_byte_a_number_and_the_dtype_stays(precision):
    linear = torch.nn.Linear(256, 512, bias=False).to(torch.bfloat16)
    made = EightBitLinear(linear, precision)
    assert sum(parameter.nbytes for parameter in made.parameters()) == 512 * 256 + 4 * 512
    x = torch.randn(3, 256, dtype=torch.bfloat16, requires_grad=True)
    made(x).sum().backward()
    assert made(x).dtype == x.grad.dtype == torch.bfloat16
    assert made(x[:0]).shape == (0, 512), "an empty prompt has no rows"


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_weight_that_is_only_held_in_int8_multiplies_what_comes_unrounded(has_bias):
    generator = torch.Generator().manual_seed(3)
    linear = torch.nn.Linear(96, 64, bias=has_bias)
    linear.weight.data = torch.randn(64, 96, generator=generator) * torch.logspace(-2, 2, 64)[:, None]
    # As in T5, one activation is so large that the others of its row would be rounded to 0.
    x = torch.randn(2, 5, 96, generator=generator)
    x[..., 7] *= 1000
    expected = x.double() @ rounded(linear.weight.detach(), "int8").t()
    if has_bias:
        expected = expected + linear.bias.detach()
    assert relative_error(Int8WeightLinear(linear)(x).detach(), expected) <= TOLERANCE


@pytest.mark.parametrize("num_scales", [1, 6])
def test_a_stored_weight_keeps_its_one_scale_or_its_scale_per_row(num_scales):
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(6, 4, generator=generator).to(EIGHT_BIT["fp8"])
    scale = torch.rand(num_scales, 1, generator=generator) + 0.1
    stored = rows, scale if num_scales > 1 else scale.reshape(())
    assert torch.equal(dequantized(EightBitLinear(torch.nn.Linear(4, 6), "fp8", stored)), rows.float() * scale)
