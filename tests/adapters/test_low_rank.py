import pytest
import torch
from helpers_adapters import delta64

from mochi_tune.adapters import low_rank
from mochi_tune.adapters.files import LoraLayer
from mochi_tune.adapters.low_rank import (
    Limit,
    approximate,
    change_norm,
    effective_rank,
    factor,
    inner_product,
    singular_values,
    stack_layers,
    truncate_layer,
)
from mochi_tune.errors import ConfigError


def random_layer(seed, num_out=40, num_in=24, rank=6, alpha=9.0):
    generator = torch.Generator().manual_seed(seed)
    return LoraLayer(
        torch.randn(rank, num_in, generator=generator), torch.randn(num_out, rank, generator=generator), alpha
    )


# In the last two, the rank is larger than a side of the matrix.
SIZES = [(40, 24, 6), (24, 40, 6), (5, 40, 8), (40, 5, 8)]


@pytest.mark.parametrize(("num_out", "num_in", "rank"), SIZES)
def test_the_factors_are_the_change(num_out, num_in, rank):
    layer = random_layer(0, num_out, num_in, rank)
    change = delta64(layer)
    left, core, right = factor(layer)
    torch.testing.assert_close(left @ core @ right, change, rtol=0, atol=1e-13 * float(change.norm()))
    values, exact = singular_values(layer), torch.linalg.svdvals(change)
    count = min(len(values), len(exact))
    torch.testing.assert_close(values[:count], exact[:count], rtol=0, atol=1e-7 * float(change.norm()))
    assert float(values[count:].norm()) <= 1e-7 * float(change.norm())
    assert float(values.norm()) == pytest.approx(float(change.norm()), rel=1e-13)
    assert float(core.norm()) == pytest.approx(float(change.norm()), rel=1e-13)


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.9, 2), (16 / 21, 1), (0.96, 3), (1.0, 3)])
def test_the_effective_rank_holds_the_energy(energy, rank):
    assert effective_rank(torch.tensor([4.0, 2.0, 1.0, 0.0]), energy) == rank


@pytest.mark.parametrize(("num_out", "num_in", "rank"), SIZES)
@pytest.mark.parametrize("limit", [Limit(rank=2), Limit(energy=0.7)], ids=["rank", "energy"])
def test_a_truncation_leaves_out_the_tail_of_the_singular_values(num_out, num_in, rank, limit):
    layer = random_layer(1, num_out, num_in, rank)
    change = delta64(layer)
    values = torch.linalg.svdvals(change)
    reduced, left_out = truncate_layer(layer, limit)
    assert reduced.alpha == reduced.rank < rank and reduced.a.dtype == reduced.b.dtype == torch.float32
    assert left_out == pytest.approx(float(values[reduced.rank :].norm()), rel=1e-12)
    # The halves are rounded to fp32.
    assert float((delta64(reduced) - change).norm()) == pytest.approx(left_out, rel=1e-6)
    if limit.energy:
        held = values.square().cumsum(0) / values.square().sum()
        assert held[reduced.rank - 1] >= 0.7 and (reduced.rank == 1 or held[reduced.rank - 2] < 0.7)


def test_a_layer_of_a_lower_rank_stays_as_it_is():
    layer = random_layer(2)
    assert truncate_layer(layer, Limit(rank=6)) == (layer, 0.0)


def test_stack_layers_is_the_sum_and_inner_product_that_of_the_elements():
    one, other = random_layer(3), random_layer(4, rank=3, alpha=1.0)
    expected = 0.8 * delta64(one) - 0.5 * delta64(other)
    stacked = stack_layers([one, other], [0.8, -0.5])
    assert stacked.rank == stacked.alpha == 9
    torch.testing.assert_close(delta64(stacked), expected, rtol=0, atol=2e-7 * float(expected.abs().max()))
    assert inner_product(one, other) == pytest.approx(float((delta64(one) * delta64(other)).sum()), rel=1e-12)
    assert change_norm(one) == pytest.approx(float(delta64(one).norm()), rel=1e-13)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_an_approximation_is_the_best_one(shape):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    values = torch.linalg.svdvals(change.double())
    layer, left_out = approximate(change.clone(), 7)
    assert layer.rank == layer.alpha == 7
    assert left_out == pytest.approx(float(values[7:].norm()), rel=1e-6)
    assert float((change.double() - delta64(layer)).norm()) == pytest.approx(left_out, rel=1e-6)
    assert approximate(change.clone(), 100)[0].rank == 30


def test_a_large_change_is_approximated_and_its_error_is_measured(monkeypatch):
    """The singular values fall slowly, which is the hardest case for power iteration."""
    monkeypatch.setattr(low_rank, "EXACT_WIDTH", 100)
    generator = torch.Generator().manual_seed(6)
    u, v = (torch.linalg.qr(torch.randn(n, 200, generator=generator)).Q for n in (400, 300))
    spectrum = 1 / torch.arange(1, 201) ** 0.5
    change = (u * spectrum) @ v.T
    layer, left_out = approximate(change.clone(), 8)
    best = float(spectrum[8:].double().norm())
    assert best * (1 - 1e-6) <= left_out <= best * 1.001
    assert float((change.double() - delta64(layer)).norm()) == pytest.approx(left_out, rel=1e-5)
    known = (u[:, :5] * spectrum[:5]) @ v[:, :5].T
    layer, left_out = approximate(known.clone(), 8)
    assert left_out <= 1e-5 * float(known.norm())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "neither given"),
        ({"rank": 2, "energy": 0.5}, "both given"),
        ({"rank": 0}, "rank=0 does not fit"),
        ({"energy": 0.0}, "energy=0 does not fit"),
        ({"energy": 1.1}, "energy=1.1 does not fit"),
    ],
)
def test_a_limit_is_one_number_in_its_range(given, said):
    with pytest.raises(ConfigError, match=said):
        Limit(**given)
