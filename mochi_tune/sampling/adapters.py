"""The adapters of a rendering: which files, how strong, and whether they fit the base."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mochi_tune.adapters.files import Adapter, check_adapter, load_adapter
from mochi_tune.config.sample import SampleConfig
from mochi_tune.errors import ConfigError
from mochi_tune.sampling.strengths import as_ranges, read_block_strengths, read_schedules


@dataclass(frozen=True)
class RenderAdapter:
    """An adapter file and its strength.

    Attributes:
        path: of the file.
        strength: of all of it.
        adapter: its layers.
        block_strengths: further factors, by the number of the block; 1 where there is none.
        schedule: further factors, spread over the steps as by `SamplerSettings.spread`; none is 1.
    """

    path: Path
    strength: float
    adapter: Adapter
    block_strengths: Mapping[int, float] = field(default_factory=dict)
    schedule: tuple[float, ...] = ()

    @property
    def further(self) -> dict[str, Any]:
        """The further factors that are set, by their settings' names, as JSON holds them."""
        further: dict[str, Any] = {}
        if self.block_strengths:
            further["block_strength"] = as_ranges(self.block_strengths)
        if self.schedule:
            further["strength_schedule"] = list(self.schedule)
        return further


def load_render_adapters(
    sample: SampleConfig, run_dir: Path, shapes: dict[str, tuple[int, int]], identity: str
) -> list[RenderAdapter]:
    """Loads the adapters of a rendering and checks that they fit the base.

    Args:
        sample: names the files and their strengths.
        run_dir: the run whose adapter is used where none is named and there is one.
        shapes: of the base's Linear layers.
        identity: of the base, from `WeightsFolder.base_identity`.

    Raises:
        ConfigError: not one strength an adapter, a strength that is no number, a block that the base does not have, or
            nothing to compare the base with.
        CheckpointError: a file is no adapter, or one of another base.
    """
    adapters, found = [], find_adapters(sample, run_dir)
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    by_block, schedules = read_block_strengths(sample, len(found), depth), read_schedules(sample, len(found))
    for (path, strength), block_strengths, schedule in zip(found, by_block, schedules, strict=True):
        adapter = load_adapter(path)
        check_adapter(adapter, shapes, identity)
        adapters.append(RenderAdapter(path, strength, adapter, block_strengths, schedule))
    if sample.compare and not any(adapter.strength for adapter in adapters):
        raise ConfigError(
            "sample.compare=base has no adapter to compare with: name adapter=FILE, of a strength other than 0."
        )
    return adapters


def find_adapters(sample: SampleConfig, run_dir: Path) -> list[tuple[Path, float]]:
    """Returns the adapter files and their strengths; raises as `load_render_adapters`."""
    named, strengths = sample.adapter, sample.adapter_strength
    if named is None:
        own = run_dir / "adapter.safetensors"
        named = [own] if own.exists() else []
    paths = [Path(str(path)) for path in (named if isinstance(named, list) else [named])]
    for strength in strengths if isinstance(strengths, list) else [strengths]:
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            raise ConfigError(f"adapter_strength={strength} is not a number: use for example 0.8.")
    if not paths and strengths not in (0, 1):
        raise ConfigError(f"adapter_strength={strengths} has no adapter: name one with adapter=FILE, or train first.")
    if not isinstance(strengths, list):
        strengths = [strengths] * len(paths)
    if len(strengths) != len(paths):
        raise ConfigError(
            f"adapter_strength has {len(strengths)} values for {len(paths)} adapters: give one for all or one each."
        )
    return list(zip(paths, map(float, strengths), strict=True))
