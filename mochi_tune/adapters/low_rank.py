"""Arithmetic on low-rank changes through their small factors, in fp64: no matrix of a Linear's size is formed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mochi_tune.adapters.layers import LoraLayer
from mochi_tune.errors import ConfigError

# Matrices of no more rows or columns are decomposed completely; of larger ones only the leading components are found.
EXACT_WIDTH = 1024
# Of the search for leading components: more are followed than are asked for, and how often at most.
OVERSAMPLING, MAX_ROUNDS = 16, 40


class Factored(NamedTuple):
    """A change of the weights as left @ core @ right.

    Attributes:
        left: (out, k), orthonormal columns.
        core: (k, l), which has the change's norm and singular values; k and l are the rank, or a smaller side.
        right: (l, in), orthonormal rows.
    """

    left: Tensor
    core: Tensor
    right: Tensor


@dataclass(frozen=True)
class Limit:
    """How far ranks are reduced: to a number, or as far as a share of each layer's energy is kept.

    Attributes:
        rank: of each layer at most; layers of a lower rank stay as they are.
        energy: share of the sum of the squared singular values that each layer keeps at least, in (0, 1].

    Raises:
        ConfigError: both or none are given, or one is out of range.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            given = "neither" if self.rank is None else "both"
            raise ConfigError(f"rank= and energy= are {given} given: give one of them, such as rank=8 or energy=0.99.")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank={self.rank} does not fit: it takes a whole number of at least 1.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(f"energy={self.energy:g} does not fit: it takes a share above 0 and up to 1, as 0.99.")

    def rank_of(self, singular_values: Tensor) -> int:
        """Returns the rank to which a layer of these singular values, largest first, is reduced."""
        if self.rank is not None:
            return min(self.rank, len(singular_values))
        assert self.energy is not None, "one of the two is given"
        return effective_rank(singular_values, self.energy)


def factor(layer: LoraLayer) -> Factored:
    """Factors what a layer adds to its Linear's weight; of a DoRA, what it adds before the rows get their lengths."""
    left, upper_b = torch.linalg.qr(layer.b.double())
    right, upper_a = torch.linalg.qr(layer.a.double().T)
    return Factored(left, layer.scale * upper_b @ upper_a.T, right.T)


def singular_values(layer: LoraLayer) -> Tensor:
    """Returns the singular values of what a layer adds, largest first, as many as its rank.

    They are the roots of the eigenvalues of B'B AA', which is small: right to 1e-8 of the largest one, and their norm,
    which is that of the change, to fp64's rounding.
    """
    a, b = layer.a.double(), layer.scale * layer.b.double()
    eigenvalues, vectors = torch.linalg.eigh(b.T @ b)
    root = vectors * eigenvalues.clamp(min=0).sqrt()
    return torch.linalg.eigvalsh(root.T @ (a @ a.T) @ root).clamp(min=0).sqrt().flip(0)


def effective_rank(values: Tensor, energy: float) -> int:
    """Returns how many of the largest singular values hold a share `energy` of the sum of all squares; at least 1."""
    held = values.double().square().cumsum(0)
    return min(int((held < energy * held[-1]).sum()) + 1, len(values))


def truncate_layer(layer: LoraLayer, limit: Limit) -> tuple[LoraLayer, float]:
    """Returns the closest layer of a lower rank, with alpha = rank, and the norm of the difference.

    A layer that is not reduced comes back as it is, with a difference of 0.
    """
    left, core, right = factor(layer)
    u, values, vt = torch.linalg.svd(core)
    rank = limit.rank_of(values)
    if rank >= layer.rank:
        return layer, 0.0
    reduced = _balanced(left @ u[:, :rank], values[:rank], vt[:rank] @ right)
    return reduced, float(values[rank:].norm())


def stack_layers(layers: Sequence[LoraLayer], strengths: Sequence[float]) -> LoraLayer:
    """Returns the sum of strength times change as one layer, exactly: the ranks add up, and alpha = rank."""
    assert all(layer.magnitude is None for layer in layers), "DoRAs do not add up"
    a = torch.cat([layer.a for layer in layers])
    scaled = [strength * layer.scale * layer.b.double() for layer, strength in zip(layers, strengths, strict=True)]
    return LoraLayer(a, torch.cat(scaled, dim=1).to(layers[0].b.dtype), float(len(a)))


def change_norm(layer: LoraLayer) -> float:
    """Returns the Frobenius norm of what a layer adds to its Linear's weight, as `factor` means it."""
    return math.sqrt(max(inner_product(layer, layer), 0.0))


def inner_product(layer: LoraLayer, other: LoraLayer) -> float:
    """Returns the sum of the products of two changes' elements, by tr((B'B)(AA')), whose factors are rank by rank.

    The norm of a difference follows from products, |x|^2 + |y|^2 - 2xy: where x and y cancel, it is right to 1e-8 |x|.
    """
    columns, rows = layer.b.double().T @ other.b.double(), layer.a.double() @ other.a.double().T
    return layer.scale * other.scale * float((columns * rows).sum())


def approximate(change: Tensor, rank: int) -> tuple[LoraLayer, float]:
    """Returns a layer of a rank that is closest to a full change of the weights, and the norm of what is left.

    Up to EXACT_WIDTH it is the best one. Larger changes are searched for their leading components until another round
    would gain next to nothing; the norm is measured either way, so that it is what the layer really leaves out.

    Args:
        change: (out, in), fp32, which is overwritten by what is left.
        rank: of the layer; the change's size where that is smaller.
    """
    rank = min(rank, *change.shape)
    if min(change.shape) <= EXACT_WIDTH:
        u, values, vt = torch.linalg.svd(change.double(), full_matrices=False)
    else:
        u, values, vt = _leading_components(change, rank)
    layer = _balanced(u[:, :rank], values[:rank], vt[:rank])
    change.addmm_(layer.b, layer.a, alpha=-1)
    return layer, float(torch.linalg.vector_norm(change, dtype=torch.float64))


def _leading_components(change: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the first singular vectors by block power iteration, started from fixed random numbers.

    Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4.
    """
    size = min(rank + OVERSAMPLING, *change.shape)
    start = torch.randn(change.shape[1], size, generator=torch.Generator().manual_seed(0))
    right, held = torch.linalg.qr(start.to(change.device)).Q, 0.0
    total = float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
    for _ in range(MAX_ROUNDS):
        left = torch.linalg.qr(change @ right).Q
        right, upper = torch.linalg.qr(change.T @ left)
        before, held = held, float(torch.linalg.svdvals(upper.double())[:rank].square().sum())
        if held - before <= max(1e-4 * (total - held), 1e-10 * total):
            break
    # change is now about left @ upper.T @ right.T.
    u, values, vt = torch.linalg.svd(upper.T.double())
    return left.double() @ u, values, vt @ right.double().T


def _balanced(left: Tensor, values: Tensor, right: Tensor) -> LoraLayer:
    """Makes a layer of singular vectors and values, whose roots go into both halves."""
    roots = values.sqrt()
    return LoraLayer((roots[:, None] * right).float(), (left * roots).float(), float(len(values)))


def relative(part: float, whole: float) -> float:
    """Returns part / whole for two norms; 0 where both are 0."""
    return 0.0 if part == 0 else part / whole if whole else math.inf
