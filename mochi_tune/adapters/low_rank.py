"""Arithmetic on low-rank changes in fp64, on their factors: no matrix of a Linear's size is computed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mochi_tune.adapters.layers import LoraLayer
from mochi_tune.errors import ConfigError

# Maximum smaller side of a matrix for a full SVD; of larger ones only the leading components are computed.
EXACT_WIDTH = 1024
# Power iteration: number of components in addition to the requested ones, and maximum number of rounds.
_OVERSAMPLING, _MAX_ROUNDS = 16, 40


class Factored(NamedTuple):
    """A change of the weights as left @ core @ right.

    Attributes:
        left: (out, k), with orthonormal columns.
        core: (k, l), with the norm and the singular values of the change; k and l are the rank, or a side if smaller.
        right: (l, in), with orthonormal rows.
    """

    left: Tensor
    core: Tensor
    right: Tensor


@dataclass(frozen=True)
class Limit:
    """A limit for reducing ranks: a rank, or the energy that each layer keeps.

    Attributes:
        rank: maximum rank of each layer; layers with a lower rank stay as they are.
        energy: minimum fraction of the sum of squared singular values that each layer keeps, in (0, 1].

    Raises:
        ConfigError: both or neither are given, or one is out of range.
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
        """Returns the reduced rank of a layer with these singular values, which are sorted largest first."""
        if self.rank is not None:
            return min(self.rank, len(singular_values))
        assert self.energy is not None, "one of the two is given"
        return effective_rank(singular_values, self.energy)


def factor(layer: LoraLayer) -> Factored:
    """Factors the change of a layer; in a DoRA, the change before the rows are scaled to their magnitudes."""
    left, upper_b = torch.linalg.qr(layer.b.double())
    right, upper_a = torch.linalg.qr(layer.a.double().T)
    return Factored(left, layer.scale * upper_b @ upper_a.T, right.T)


def singular_values(layer: LoraLayer) -> Tensor:
    """Returns the singular values of a layer's change, largest first, as many as its rank.

    They are the roots of the eigenvalues of B'B AA', which is small. They are accurate to 1e-8 of the largest one, and
    their norm, which is that of the change, to fp64 rounding.
    """
    a, b = layer.a.double(), layer.scale * layer.b.double()
    eigenvalues, vectors = torch.linalg.eigh(b.T @ b)
    root = vectors * eigenvalues.clamp(min=0).sqrt()
    return torch.linalg.eigvalsh(root.T @ (a @ a.T) @ root).clamp(min=0).sqrt().flip(0)


def effective_rank(values: Tensor, energy: float) -> int:
    """Returns how many of the largest singular values hold a fraction `energy` of the sum of squares; at least 1."""
    held = values.double().square().cumsum(0)
    return min(int((held < energy * held[-1]).sum()) + 1, len(values))


def truncate_layer(layer: LoraLayer, limit: Limit) -> tuple[LoraLayer, float]:
    """Returns the closest layer within a limit, with alpha = rank, and the norm of the difference.

    A layer that is not reduced is returned as it is, with a difference of 0.
    """
    left, core, right = factor(layer)
    u, values, vt = torch.linalg.svd(core)
    rank = limit.rank_of(values)
    if rank >= layer.rank:
        return layer, 0.0
    reduced = _balanced(left @ u[:, :rank], values[:rank], vt[:rank] @ right)
    return reduced, float(values[rank:].norm())


def stack_layers(layers: Sequence[LoraLayer], strengths: Sequence[float]) -> LoraLayer:
    """Returns the exact sum of the changes, each times its strength, as one layer; ranks add up, and alpha = rank."""
    assert all(layer.magnitude is None for layer in layers), "DoRAs do not add up"
    a = torch.cat([layer.a for layer in layers])
    scaled = [strength * layer.scale * layer.b.double() for layer, strength in zip(layers, strengths, strict=True)]
    return LoraLayer(a, torch.cat(scaled, dim=1).to(layers[0].b.dtype), float(len(a)))


def change_norm(layer: LoraLayer) -> float:
    """Returns the Frobenius norm of the change that `factor` describes."""
    return math.sqrt(max(inner_product(layer, layer), 0.0))


def inner_product(layer: LoraLayer, other: LoraLayer) -> float:
    """Returns the inner product of two changes, tr((B'B)(AA')), whose factors are rank by rank.

    The norm of a difference follows from |x|^2 + |y|^2 - 2xy; where x and y cancel, it is accurate to 1e-8 |x|.
    """
    columns, rows = layer.b.double().T @ other.b.double(), layer.a.double() @ other.a.double().T
    return layer.scale * other.scale * float((columns * rows).sum())


def approximate(change: Tensor, rank: int) -> tuple[LoraLayer, float]:
    """Approximates a full-rank change of the weights by a layer; returns the layer and the norm of the residual.

    The approximation is the best one if a side of the change is at most EXACT_WIDTH. For larger changes, power
    iteration finds the leading components until another round would gain almost nothing. The norm is measured in both
    cases.

    Args:
        change: (out, in), fp32; overwritten by the residual.
        rank: maximum rank of the layer.
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
    """Computes the leading singular vectors by block power iteration from fixed random numbers.

    Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4.
    """
    size = min(rank + _OVERSAMPLING, *change.shape)
    start = torch.randn(change.shape[1], size, generator=torch.Generator().manual_seed(0))
    right, held = torch.linalg.qr(start.to(change.device)).Q, 0.0
    total = float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
    for _ in range(_MAX_ROUNDS):
        left = torch.linalg.qr(change @ right).Q
        right, upper = torch.linalg.qr(change.T @ left)
        before, held = held, float(torch.linalg.svdvals(upper.double())[:rank].square().sum())
        if held - before <= max(1e-4 * (total - held), 1e-10 * total):
            break
    # change is approximately left @ upper.T @ right.T.
    u, values, vt = torch.linalg.svd(upper.T.double())
    return left.double() @ u, values, vt @ right.double().T


def _balanced(left: Tensor, values: Tensor, right: Tensor) -> LoraLayer:
    """Makes a layer from singular vectors and values; each half gets the roots of the values."""
    roots = values.sqrt()
    return LoraLayer((roots[:, None] * right).float(), (left * roots).float(), float(len(values)))


def relative(part: float, whole: float) -> float:
    """Returns part / whole for two norms; 0 where both are 0."""
    return 0.0 if part == 0 else part / whole if whole else math.inf
