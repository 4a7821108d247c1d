"""The random numbers of the training steps, from which `objective.sigmas_from_uniforms` makes sigma.

Each sample has a separate generator that is seeded by (seed, purpose, step, sample). A resumed run therefore draws the
same numbers, with any number of processes and in any order, and checkpoints store no generator state. Dropout has one
seed per micro-batch.

The samples of a step are numbered across all processes: sample i is row i % batch_size of micro-batch i // batch_size.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def key_seed(seed: int, *key: str | int) -> int:
    """Returns a 63-bit seed for a key; different keys have independent seeds."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def keyed_generator(seed: int, *key: str | int) -> torch.Generator:
    """Returns a CPU generator seeded by the key."""
    return torch.Generator().manual_seed(key_seed(seed, *key))


# The dtype is fixed, because the numbers depend on it and torch's default dtype can be changed.
_rand, _randn = functools.partial(torch.rand, dtype=torch.float32), functools.partial(torch.randn, dtype=torch.float32)


def generator_fingerprint(seed: int) -> str:
    """Returns a sha256 of some draws of each kind; it changes if a version of torch draws other numbers."""
    # Checkpoints store this fingerprint. With another key than "proof", existing checkpoints could not be resumed.
    generator = keyed_generator(seed, "proof")
    drawn = (_rand(17, generator=generator), _randn(999, generator=generator))
    order = torch.randperm(99, generator=generator)
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in (*drawn, order))).hexdigest()


@dataclass(frozen=True)
class Draws:
    """The random numbers of one micro-batch of B samples.

    Attributes:
        uniforms: a number in [0, 1) for each of the S samples of the whole step, fp32, (S,). sigma is computed from all
            of them, so that it has the same bits with any number of processes.
        rows: which of the S samples the B samples are.
        drops_caption: whether a sample is trained without its caption, bool (B,).
        posterior_noise: standard normal, for the VAE's posterior, fp32 (B, C, T, h, w).
        noise: standard normal, mixed into the clip, fp32 (B, C, T, h, w).
        dropout_seed: for the adapter's dropout.
    """

    uniforms: Tensor
    rows: slice
    drops_caption: Tensor
    posterior_noise: Tensor
    noise: Tensor
    dropout_seed: int


@dataclass(frozen=True)
class KeyedDraws:
    """Draws the random numbers of the training steps; two runs with equal fields draw the same numbers.

    Attributes:
        seed: the seed of the run.
        batch_size: number of samples per micro-batch.
        num_micro_batches: number of micro-batches per step, over all processes.
        caption_dropout: probability in [0, 1) that a sample is trained without its caption.
        stratified: whether the uniform numbers of a step are spread evenly, see `stratify`.
    """

    seed: int
    batch_size: int
    num_micro_batches: int
    caption_dropout: float
    stratified: bool

    def batch_number(self, step: int, micro_batch: int) -> int:
        """Returns the number of a micro-batch since the start of training; step counts from 1, micro_batch from 0."""
        return (step - 1) * self.num_micro_batches + micro_batch

    def caption(self, step: int, sample: int, count: int) -> int:
        """Returns the index of the caption that a sample is trained with; `count` is the number of its captions."""
        if count == 1:
            return 0
        return int(torch.randint(count, (), generator=keyed_generator(self.seed, "caption", step, sample)))

    def uniforms(self, step: int) -> Tensor:
        """Returns a number in [0, 1) for each sample of a step, fp32, (S,)."""
        return step_uniforms(self, step).clone()

    def draw(self, step: int, micro_batch: int, shape: Sequence[int]) -> Draws:
        """Draws the numbers of a micro-batch; `shape` is the shape of the latents of a sample, (C, T, h, w)."""
        rows = slice(micro_batch * self.batch_size, (micro_batch + 1) * self.batch_size)
        drops_caption, posterior_noise, noise = [], [], []
        for sample in range(rows.start, rows.stop):
            generator = self._generator(step, sample)
            _rand((), generator=generator)  # Skips the number that `uniforms` draws from this generator.
            drops_caption.append(_rand((), generator=generator) < self.caption_dropout)
            posterior_noise.append(_randn(shape, generator=generator))
            noise.append(_randn(shape, generator=generator))
        return Draws(
            self.uniforms(step), rows, torch.stack(drops_caption), torch.stack(posterior_noise), torch.stack(noise),
            dropout_seed=key_seed(self.seed, "dropout", step, micro_batch),
        )  # fmt: skip

    def _generator(self, step: int, sample: int) -> torch.Generator:
        return keyed_generator(self.seed, "train", step, sample)


# Each micro-batch of a step has them. With hundreds of micro-batches, drawing them for each takes a second a step.
@functools.lru_cache(maxsize=4)
def step_uniforms(draws: KeyedDraws, step: int) -> Tensor:
    """Draws `KeyedDraws.uniforms`; callers must not change the tensor."""
    count = draws.batch_size * draws.num_micro_batches
    uniforms = torch.stack([_rand((), generator=keyed_generator(draws.seed, "train", step, i)) for i in range(count)])
    if not draws.stratified:
        return uniforms
    return stratify(uniforms, torch.randperm(count, generator=keyed_generator(draws.seed, "strata", step)))


def stratify(uniforms: Tensor, permutation: Tensor) -> Tensor:
    """Maps N uniform numbers to N equal strata of [0, 1): number i to stratum permutation[i].

    With a random permutation, each number is still uniform, but together they cover the whole interval. The mean loss
    of a step then varies less with the noise levels.

    Args:
        uniforms: numbers in [0, 1) of all samples of a step, (N,).
        permutation: a permutation of 0 to N - 1, (N,).
    """
    # fp32 would round a number just below 1 to 1.
    return ((permutation + uniforms.double()) / len(permutation)).float().clamp(max=1 - 2**-24)
