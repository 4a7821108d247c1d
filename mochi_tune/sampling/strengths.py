"""Reads and checks the strengths of a rendering's adapters by block and by step, before any weight is read."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mochi_tune.config.explain import as_yaml
from mochi_tune.config.sample import SampleConfig
from mochi_tune.errors import ConfigError
from mochi_tune.sampling.sampler import SamplerSettings


def read_block_strengths(sample: SampleConfig, num_adapters: int, depth: int) -> list[dict[int, float]]:
    """Returns, for each adapter, the factors of the blocks that `sample.block_strength` names.

    Args:
        sample: the settings.
        num_adapters: number of adapters of the rendering.
        depth: number of blocks of the base.

    Raises:
        ConfigError: a key is not a block or range of blocks, a block is named twice, or the number of mappings is
            neither one nor that of the adapters.
    """
    mappings = _one_each("block_strength", sample.block_strength, num_adapters, dict)
    return [_factors_by_block(mapping, depth) for mapping in mappings]


def as_ranges(factors: Mapping[int, float]) -> dict[str, float]:
    """Returns factors of blocks in the form of `sample.block_strength`, with the longest possible ranges."""
    ranges: list[tuple[int, int, float]] = []
    for block, factor in sorted(factors.items()):
        if ranges and (ranges[-1][1] + 1, ranges[-1][2]) == (block, factor):
            ranges[-1] = (ranges[-1][0], block, factor)
        else:
            ranges.append((block, block, factor))
    return {f"{first}" if first == last else f"{first}-{last}": factor for first, last, factor in ranges}


def read_schedules(sample: SampleConfig, num_adapters: int) -> list[tuple[float, ...]]:
    """Returns, for each adapter, the values of `sample.strength_schedule`; empty if it is not set.

    Raises:
        ConfigError: a schedule has no values, or the number of schedules is neither one nor that of the adapters.
    """
    given = sample.strength_schedule
    if given is None:
        return [()] * num_adapters
    if not given or [] in given:
        raise ConfigError(
            f"sample.strength_schedule={as_yaml(given)} has no value for a step: give numbers, such as [1, 0.5]."
        )
    values = given if isinstance(given[0], list) else tuple(given)
    return [tuple(schedule) for schedule in _one_each("strength_schedule", values, num_adapters, tuple)]


def check_schedules(schedules: Iterable[Sequence[float]], settings: Iterable[SamplerSettings]) -> None:
    """Refuses schedules with more values than a rendering has steps.

    Raises:
        ConfigError: a schedule is longer than the number of steps; names both numbers.
    """
    longest, steps = max(map(len, schedules), default=0), min(each.steps for each in settings)
    if longest > steps:
        raise ConfigError(
            f"sample.strength_schedule has {longest} numbers for {steps} steps: give at most one for each step."
        )


def _one_each(name: str, given: Any, num_adapters: int, common: type) -> list[Any]:
    """Returns the value of each adapter: `given` for all of them if it is of the type `common`, else its items."""
    if given and not num_adapters:
        raise ConfigError(
            f"sample.{name}={as_yaml(_plain(given))} has no adapter: name one with adapter=FILE, or train first."
        )
    if isinstance(given, common):
        return [given] * num_adapters
    if len(given) != num_adapters:
        raise ConfigError(
            f"sample.{name} has {len(given)} values for {num_adapters} adapters: give one for all or one each."
        )
    return list(given)


def _plain(given: Any) -> Any:
    return list(given) if isinstance(given, tuple) else given


def _factors_by_block(mapping: Mapping[str, float], depth: int) -> dict[int, float]:
    factors: dict[int, float] = {}
    for key, factor in mapping.items():
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", key, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not 0 <= first <= last < depth:
            raise ConfigError(
                f"sample.block_strength: {key!r} is not a block of the base: use a number from 0 to {depth - 1}, or a "
                f"range such as 0-{depth - 1}."
            )
        if twice := factors.keys() & set(range(first, last + 1)):
            raise ConfigError(f"sample.block_strength names block {min(twice)} twice: use ranges that do not overlap.")
        factors |= dict.fromkeys(range(first, last + 1), factor)
    return factors
