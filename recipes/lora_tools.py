"""Tools for adapter files: inspect, merge, resize and compare. None of them reads the base weights."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mochi_tune.adapters.alphas import source_words
from mochi_tune.adapters.files import Adapter, load_adapter, save_adapter
from mochi_tune.adapters.low_rank import Limit
from mochi_tune.adapters.tools import (
    Comparison,
    Errors,
    LayerFacts,
    assumed_note,
    compare_adapters,
    measure_layers,
    merge_adapters,
    resize_adapter,
    source_of,
)
from mochi_tune.recipes.new_output import check_new_file, make_parent


@dataclass(frozen=True)
class Inspection:
    """Result of `lora inspect`: the adapter, the source of its alphas, its sha256 and measurements of each layer."""

    adapter: Adapter
    alpha_source: str
    sha256: str
    layers: dict[str, LayerFacts]

    @property
    def alpha_words(self) -> str:
        """The source of its alphas, as part of a sentence."""
        return source_words(self.alpha_source)

    def as_json(self) -> dict[str, Any]:
        """Returns the result as a JSON object."""
        return {
            "file": str(self.adapter.path),
            "sha256": self.sha256,
            "is_dora": self.adapter.is_dora,
            "alpha_source": self.alpha_source,
            "metadata": self.adapter.metadata,
            "layers": {name: asdict(facts) for name, facts in self.layers.items()},
        }


@dataclass(frozen=True)
class Made:
    """A new adapter file made from others.

    Attributes:
        file: the new file.
        adapter: its content.
        errors: errors of the approximation; None if the result is exact.
        note: remarks for the user, which start with "; "; "" if there are none.
    """

    file: Path
    adapter: Adapter
    errors: Errors | None
    note: str = ""

    def __str__(self) -> str:
        ranks = sorted({layer.rank for layer in self.adapter.layers.values()})
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        error = "exact sum" if self.errors is None else str(self.errors)
        return f"{self.file}: {len(self.adapter.layers)} layers, rank {rank}, {error}{self.note}"


def inspect(file: Path | str, page: Path | None = None) -> Inspection:
    """Measures every layer of an adapter file, and optionally writes a page about it.

    Args:
        file: an adapter in any layout.
        page: new .html file; None writes no page.

    Raises:
        ConfigError: `page` exists or has another suffix, or its folder cannot be made.
        CheckpointError: the adapter cannot be read.
    """
    if page is not None:
        check_new_file(page, ".html")
    adapter = load_adapter(file)
    found = Inspection(adapter, adapter.alpha_source, source_of(adapter).get("sha256", ""), measure_layers(adapter))
    if page is not None:
        from mochi_tune.files import write_atomic
        from mochi_tune.recipes.lora_page import make_page

        make_parent(page)
        write_atomic(page, make_page(found).encode())
    return found


def merge(files: Sequence[Path | str], strengths: Sequence[float], out: Path, limit: Limit | None = None) -> Made:
    """Merges adapter files, each times its strength, into a new native file; see `merge_adapters`."""
    check_new_file(out, ".safetensors")
    adapters = [load_adapter(file) for file in files]
    merged, errors = merge_adapters(adapters, strengths, limit, release_layers=True)
    merged.metadata.setdefault("name", out.stem)  # Its title, where the runs have different names.
    unnamed = [str(each.path) for each in adapters if "base_fingerprint" not in each.metadata]
    note = f"; bases not compared, as {', '.join(unnamed)} names none" if unnamed else ""
    return _save(out, merged, errors, note + assumed_note(*adapters))


def resize(file: Path | str, out: Path, limit: Limit) -> Made:
    """Approximates an adapter at a lower rank and writes it to a new native file; see `resize_adapter`."""
    check_new_file(out, ".safetensors")
    source = load_adapter(file)
    resized, errors = resize_adapter(source, limit)
    kept = sum(resized.layers[name].rank == layer.rank for name, layer in source.layers.items())
    note = f"; {kept} layers were not reduced" if kept else ""
    return _save(out, resized, errors, note + assumed_note(source))


def compare(first: Path | str, second: Path | str) -> Comparison:
    """Compares two adapter files; see `compare_adapters`."""
    adapters = load_adapter(first), load_adapter(second)
    return replace(compare_adapters(*adapters), note=assumed_note(*adapters))


def save_new(out: Path, adapter: Adapter) -> None:
    """Writes an adapter to a new native file, and makes its folder.

    Raises:
        ConfigError: the folder cannot be made.
    """
    make_parent(out)
    save_adapter(out, adapter, "native")


def _save(out: Path, adapter: Adapter, errors: Errors | None, note: str) -> Made:
    save_new(out, adapter)
    return Made(out, adapter, errors, note)
