"""The adapters of a rendering: finds their files and strengths, and checks that they fit the base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mochi_tune.adapters.files import Adapter, check_adapter, load_adapter
from mochi_tune.config.sample import SampleConfig
from mochi_tune.errors import CheckpointError, ConfigError, some
from mochi_tune.sampling.strengths import as_ranges, read_block_strengths, read_schedules

# Layers that, like the blocks' modulation layers, are computed once before the first step.
EMBEDDERS = ("t_embedder.", "t5_y_embedder.")


@dataclass(frozen=True)
class RenderAdapter:
    """An adapter file and its strength.

    Attributes:
        path: the adapter's file.
        strength: factor of the whole adapter.
        adapter: its layers.
        block_strengths: additional factors by the number of the block; blocks that are not listed have 1.
        schedule: additional factors, spread over the steps by `SamplerSettings.spread`; empty for 1.
    """

    path: Path
    strength: float
    adapter: Adapter
    block_strengths: Mapping[int, float] = field(default_factory=dict)
    schedule: tuple[float, ...] = ()

    @property
    def further(self) -> dict[str, Any]:
        """The additional factors that are set, as JSON values by the names of their settings."""
        further: dict[str, Any] = {}
        if self.block_strengths:
            further["block_strength"] = as_ranges(self.block_strengths)
        if self.schedule:
            further["strength_schedule"] = list(self.schedule)
        return further

    def __str__(self) -> str:
        further = "".join(f", {name.replace('_', ' ')} {values}" for name, values in self.further.items())
        return f"adapter {self.path} x {self.strength}{further}, {self.adapter.alpha_note}"

    def record(self) -> dict[str, Any]:
        """Returns the entry of this adapter in the settings file of each video."""
        return {
            "file": str(self.path),
            "sha256": self.adapter.sha256,
            "strength": self.strength,
            "alpha": self.adapter.alpha,
            "alpha_source": self.adapter.alpha_source,
            **self.further,
        }


def load_render_adapters(
    sample: SampleConfig, run_dir: Path, shapes: dict[str, tuple[int, int]], identity: str
) -> list[RenderAdapter]:
    """Loads the adapters of a rendering and checks that they fit the base.

    Args:
        sample: names the adapters, as accepted by `find_adapter_file`, and their strengths.
        run_dir: the run whose adapter, if it has one, is used when none is named.
        shapes: shapes of the base's Linear layers.
        identity: identity of the base, from `WeightsFolder.base_identity`.

    Raises:
        ConfigError: the number of strengths is not that of the adapters, a strength is not a number, the base does not
            have a block, or there is nothing to compare the base with.
        CheckpointError: a file is not an adapter, or is one for another base.
    """
    named = find_adapters(sample, run_dir)
    alphas = _given_alphas(sample, len(named))
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    by_block, schedules = read_block_strengths(sample, len(named), depth), read_schedules(sample, len(named))
    adapters = []
    for (name, strength), alpha, block_strengths, schedule in zip(named, alphas, by_block, schedules, strict=True):
        adapter = load_adapter(name, alpha)
        check_adapter(adapter, shapes, identity)
        assert adapter.path is not None, "it was loaded from a file"
        ahead = [layer for layer in adapter.layers if ".mod_" in layer or layer.startswith(EMBEDDERS)]
        if schedule and ahead:
            raise ConfigError(
                f"sample.strength_schedule does not fit {adapter}, which adapts modulation ({some(ahead)}). Modulation "
                "is computed once for all steps: leave the schedule out."
            )
        adapters.append(RenderAdapter(adapter.path, strength, adapter, block_strengths, schedule))
    if sample.compare and not any(adapter.strength for adapter in adapters):
        raise ConfigError(
            "sample.compare=base has no adapter to compare with: name adapter=FILE, with a strength other than 0."
        )
    return adapters


def check_has_adapter(sample: SampleConfig, run_dir: Path) -> None:
    """Refuses a rendering that names no adapter and whose run has none.

    Raises:
        CheckpointError: there is no adapter; the message says how to render the base.
    """
    is_named = sample.adapter is not None or sample.checkpoints is not None
    if is_named or sample.latents is not None or (run_dir / "adapter.safetensors").exists():
        return
    missing = f"{run_dir} has no adapter.safetensors" if run_dir.is_dir() else f"there is no folder {run_dir}"
    raise CheckpointError(
        f"{missing}: train first, name the run by run_dir= or a file by adapter=, or render the base by adapter=none."
    )


def find_adapters(sample: SampleConfig, run_dir: Path) -> list[tuple[str, float]]:
    """Returns the names and strengths of the adapters.

    Raises:
        ConfigError: the number of strengths is not that of the adapters, or a strength is not a number.
    """
    named, strengths = sample.adapter, sample.adapter_strength
    if named is None:
        own = run_dir / "adapter.safetensors"
        named = [own] if own.exists() else []
    names = [str(name) for name in (named if isinstance(named, list) else [named])]
    for strength in strengths if isinstance(strengths, list) else [strengths]:
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            raise ConfigError(f"adapter_strength={strength} is not a number: use for example 0.8.")
    if not names and strengths not in (0, 1):
        raise ConfigError(f"adapter_strength={strengths} has no adapter: name one with adapter=FILE, or train first.")
    if not isinstance(strengths, list):
        strengths = [strengths] * len(names)
    if len(strengths) != len(names):
        raise ConfigError(
            f"adapter_strength has {len(strengths)} values for {len(names)} adapters: give one for all or one each."
        )
    return list(zip(names, map(float, strengths), strict=True))


def _given_alphas(sample: SampleConfig, num_adapters: int) -> Sequence[float | None]:
    """Returns the value of `sample.adapter_alpha` for each adapter; None where it is not given."""
    given = sample.adapter_alpha
    if given is not None and not num_adapters:
        raise ConfigError(f"adapter_alpha={given} has no adapter: name one with adapter=FILE, or train first.")
    if not isinstance(given, list):
        return [given] * num_adapters
    if len(given) != num_adapters:
        raise ConfigError(
            f"adapter_alpha has {len(given)} values for {num_adapters} adapters: give one for all or one each."
        )
    return given
