"""How far two right fp32 computations of the same thing may be apart, found by moving their inputs by a rounding each.

A sum in another order, a fused multiply-add or another instruction set makes the exact result of inputs that are a few
roundings off (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). What one rounding of every input does to
the result is measured where the test runs; FACTOR of it is allowed. For a sum of n terms that is added up in order, the
error is about 0.35 sqrt(n) times what one rounding of each term does; no sum of the models here has more than 3000.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

FACTOR = 20
EPS = torch.finfo(torch.float32).eps


def moved(compute: Callable[[], Tensor], inputs: Sequence[Tensor], draws: int = 2) -> Iterator[Tensor]:
    """Yields what `compute` gives when each number of its inputs, such as weights, is off by up to one rounding."""
    kept = [tensor.detach().clone() for tensor in inputs]
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        for tensor, exact in zip(inputs, kept, strict=True):
            noise = 2 * torch.rand(exact.shape, generator=generator, dtype=exact.dtype) - 1
            tensor.data.copy_(exact * (1 + EPS * noise))
        yield compute().detach().clone()
    for tensor, exact in zip(inputs, kept, strict=True):
        tensor.data.copy_(exact)


def rounding_error(compute: Callable[[], Tensor], inputs: Sequence[Tensor]) -> float:
    """Returns how far another right computation may be from what `compute` gives, at any one number of it."""
    result = compute().detach().clone()
    return FACTOR * max((other - result).abs().max().item() for other in moved(compute, inputs))


def rounding_share(compute: Callable[[], Tensor], inputs: Sequence[Tensor]) -> float:
    """Returns the share of uint8 pixels that another right computation may round to a neighbour's level.

    In a small clip none may be seen to: one pixel is allowed for at least.
    """
    frames = compute().detach().clone()
    return FACTOR * max(1, *(other.ne(frames).sum().item() for other in moved(compute, inputs))) / frames.numel()


def share_of_error(decode: Callable[[Tensor], Tensor], latents: Tensor, error: float) -> float:
    """Returns the share of uint8 pixels that are rounded to another level where the latents are off by an error."""
    noise = 2 * torch.rand(latents.shape, generator=torch.Generator().manual_seed(0)) - 1
    return decode(latents + error * noise).ne(decode(latents)).float().mean().item()


def assert_same_frames(ours: Tensor, theirs: Tensor, share: float) -> None:
    """Checks uint8 frames before their compression: a share of the pixels may be rounded to the next level."""
    assert ours.dtype == theirs.dtype == torch.uint8 and ours.shape == theirs.shape
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() <= share < 0.1, (difference.float().mean(), share)
