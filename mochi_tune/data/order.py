"""The order of clips in training: a function of the seed and the number of the batch, with no saved state.

The clips of one bucket and one source form a pool, and a batch takes clips of one pool. Each pool is shuffled again in
each of its epochs; its batches run through these epochs without a gap. An epoch of the whole data set takes
`num_draws` clips of each pool, and the order of the pools is shuffled.
"""

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from mochi_tune.data.buckets import Bucket

# Maximum number of epochs that are shuffled as one. A pool with less than one draw in them gets one.
_MAX_EPOCHS = 1000


@dataclass(frozen=True)
class ClipPool:
    """Clips of one bucket and one source.

    Attributes:
        name: keys the random order of its clips, so that other pools do not change it.
        clips: numbers of its clips, at least one.
        num_draws: number of clips drawn from the pool in `num_epochs`.
        num_epochs: number of epochs that are shuffled as one, so that every pool gets its share; equal for all pools.
    """

    name: str
    clips: tuple[int, ...]
    num_draws: int
    num_epochs: int = 1


@dataclass(frozen=True)
class ClipOrder:
    """Chooses the clips of each batch.

    `batch_size` times `num_epochs` epochs have a whole number of batches of each pool. They form a cycle, in which the
    order of the pools is shuffled.

    Attributes:
        pools: at least one, with at least one draw in total.
        batch_size: number of clips in a batch.
        seed: of the run.
    """

    pools: tuple[ClipPool, ...]
    batch_size: int
    seed: int

    def batch(self, number: int) -> list[int]:
        """Returns the clips of batch `number`, counted from 0 at the start of training over all processes."""
        if len(self.pools) == 1:
            return self._clips(self.pools[0], number, "")
        num_draws = tuple(pool.num_draws for pool in self.pools)
        cycle, place = divmod(number, sum(num_draws))
        pools, so_far = shuffled_pools(num_draws, self.seed, cycle)
        which, before = pools[place], so_far[place]
        return self._clips(self.pools[which], cycle * num_draws[which] + before, f"/{self.pools[which].name}")

    @property
    def epoch_length(self) -> float:
        """Number of clips in an epoch."""
        return sum(pool.num_draws for pool in self.pools) / self.pools[0].num_epochs

    def fingerprint(self, names: Sequence[str]) -> str:
        """Returns a hash that changes when a batch would hold other clips; `names` are the names of all clips."""
        pools = [[pool.name, pool.num_draws, [names[clip] for clip in pool.clips]] for pool in self.pools]
        decisive = [pools[0][2]] if len(pools) == 1 else [self.batch_size, *pools]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    def pool_of(self, clip: int) -> ClipPool:
        """Returns the pool of a clip."""
        return next(pool for pool in self.pools if clip in pool.clips)

    def _clips(self, pool: ClipPool, number: int, key: str) -> list[int]:
        """Returns the clips of batch `number` among the batches of one pool."""
        first, count = number * self.batch_size, len(pool.clips)
        places = (divmod(position, count) for position in range(first, first + self.batch_size))
        return [pool.clips[epoch_order(count, self.seed, epoch, key)[i]] for epoch, i in places]


@lru_cache(maxsize=64)
def epoch_order(num_clips: int, seed: int, epoch: int, key: str = "") -> "array[int]":
    """Returns the shuffled clip numbers of one epoch, a pure function of the arguments."""
    return _permutation(num_clips, f"order/{seed}/{epoch}{key}")


@lru_cache(maxsize=4)
def shuffled_pools(num_draws: tuple[int, ...], seed: int, cycle: int) -> "tuple[array[int], array[int]]":
    """Returns the pool of each batch of a cycle, and the number of earlier batches of that pool in the cycle."""
    pools = [pool for pool, count in enumerate(num_draws) for _ in range(count)]
    so_far, chosen, before = [0] * len(num_draws), array("i"), array("i")
    for place in _permutation(len(pools), f"pools/{seed}/{cycle}"):
        chosen.append(pools[place])
        before.append(so_far[pools[place]])
        so_far[pools[place]] += 1
    return chosen, before


def _permutation(count: int, key: str) -> "array[int]":
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    # An array takes 4 bytes per clip, a tuple 36; many epochs of many pools are cached.
    return array("i", torch.randperm(count, generator=generator).tolist())


def make_pools(
    clips: Mapping[int, tuple[str, Bucket]],
    sources: Mapping[str, tuple[float, float | None]],
    shares: Mapping[Bucket, float],
) -> tuple[ClipPool, ...]:
    """Groups clips by source and bucket, and computes the number of draws from each group.

    Args:
        clips: source and bucket of each clip, by its number.
        sources: repeats of each source in an epoch, and its weight, which replaces the repeats unless it is None.
        shares: share of each bucket in a source's draws; {} draws all clips of a source equally often.
    """
    members: dict[str, dict[Bucket, list[int]]] = {}
    for number, (source, bucket) in sorted(clips.items()):
        members.setdefault(source, {}).setdefault(bucket, []).append(number)
    counts = {source: sum(map(len, buckets.values())) for source, buckets in members.items()}
    weights = [sources[source][1] for source in members]
    wanted = {
        source: [shares.get(bucket, 0.0) if shares else float(len(those)) for bucket, those in buckets.items()]
        for source, buckets in members.items()
    }

    def draws(scale: int) -> list[list[int]]:
        if None in weights:
            totals = [round(scale * count * sources[source][0]) for source, count in counts.items()]
        else:
            totals = apportion(scale * len(clips), [weight or 1.0 for weight in weights])
        return [apportion(total, wanted[source]) for source, total in zip(members, totals, strict=True)]

    # Every pool gets at least one draw: if one epoch is too short, several are shuffled as one.
    scales = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, _MAX_EPOCHS)
    for scale in scales:
        found = draws(scale)
        if all(
            count or not share
            for source, each in zip(members, found, strict=True)
            for count, share in zip(each, wanted[source], strict=True)
        ):
            break
    return tuple(
        ClipPool(f"{source}/{bucket}", tuple(those), max(num_draws, 1), scale)
        for (source, buckets), counted in zip(members.items(), found, strict=True)
        for (bucket, those), num_draws in zip(buckets.items(), counted, strict=True)
    )


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divides an integer in proportion to weights. The parts add up to it; each is within 1 of its exact share.

    Args:
        total: 0 or more.
        weights: positive.
    """
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(share) for share in exact]
    largest_rest = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in largest_rest[: total - sum(parts)]:
        parts[i] += 1
    return parts
