"""Renders every prompt with every seed, checkpoint and strength, as one page and one video.

The models are loaded once; from a cell to the next, only the adapter's numbers change. A cell's latents are those that
`sample` gives with the same settings. What is finished is kept, and the same command goes on from there.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from mochi_tune.adapters.lora import change_adapters, switch_adapters
from mochi_tune.config.load import RunConfig
from mochi_tune.config.sample import SampleConfig
from mochi_tune.errors import ConfigError
from mochi_tune.files import load_tensors, make_writable_folder
from mochi_tune.models.device import DTYPES, find_device, free_memory
from mochi_tune.models.vae_streaming import WHOLE
from mochi_tune.recipes.grid_page import GridCell, write_grid_page
from mochi_tune.recipes.sample import (
    RenderPlan,
    check,
    check_latents,
    choose_residency,
    encode_prompts,
    lost_tails,
    write_line,
)
from mochi_tune.sampling.formats import is_file_name
from mochi_tune.sampling.grid_video import Tile, write_grid_video
from mochi_tune.sampling.record import Usage, describe, file_metadata, noise_of, save_latents, save_settings
from mochi_tune.sampling.render import Setup, choose_guide, decoded_frames, prepare_dit
from mochi_tune.sampling.requests import Request
from mochi_tune.sampling.sampler import sample_latents
from mochi_tune.sampling.video import write_video
from mochi_tune.training.checkpoint import damage_of, find_checkpoints, published_file, step_of
from mochi_tune.training.interrupts import StopSignal

# Of settings that determine a video, these do not change what is seen.
NOT_OF_A_CELL = ("versions", "memory", "layout", "noise_sha256")


@dataclass(frozen=True)
class Cell:
    """One video of a grid.

    Attributes:
        request: prompt, seed and settings; its video is a file of the grid's folder.
        plan: with the adapters of its checkpoint.
        checkpoint: the step of the adapter; None where it is none of the run's checkpoints.
        strength: a factor on the adapters' own.
        common: what it has in common with the other cells of its plan and strength.
    """

    request: Request
    plan: RenderPlan
    checkpoint: int | None
    strength: float
    common: dict[str, Any]

    @property
    def latents(self) -> Path:
        """The file of its latents, which are there until it is decoded, or for good with `save_latents`."""
        return self.request.video.with_suffix(".safetensors")

    @property
    def adapters(self) -> dict[str, tuple[Any, float]]:
        """Layers and strength of each adapter, as `sample` applies them; empty for the base."""
        pairs = [(each.adapter.layers, self.strength * each.strength) for each in self.plan.adapters if each.strength]
        return {f"adapter_{i}": pair for i, pair in enumerate(pairs)} if self.strength else {}


def main(config: RunConfig) -> Iterator[Path]:
    """Renders a grid, yielding each cell's video when it is written, then the page and the video of all.

    Raises:
        KeyboardInterrupt: it was asked to stop; finished cells are kept, and the same command goes on.
    """
    cells = check_grid(config)
    plan, device, dtype = cells[0].plan, find_device(config.device), DTYPES[config.model.dtype]
    folder = cells[0].request.video.parent.parent
    prompt_cache = Path(config.sample.prompt_cache).expanduser()
    for needed in (prompt_cache, cells[0].request.video.parent):
        make_writable_folder(needed)
    for line in lost_tails(plan):
        write_line(line)
    missing = [cell for cell in cells if not is_done(cell)]
    missing = list({cell.request.video: cell for cell in missing}.values())
    distinct = len({cell.request.video for cell in cells})
    write_line(f"{len(cells)} cells of {distinct} videos, {distinct - len(missing)} of them are there: {folder}")
    usage = Usage(device, write_line)
    if unsampled := [cell for cell in missing if not cell.latents.exists()]:
        setup = Setup(device, dtype, choose_residency(config, plan, device))
        with usage.stage("text"):
            features = encode_prompts(plan, device, dtype, prompt_cache)
        with usage.stage("sample", plan.held(setup.residency, dtype.itemsize)):
            render_cells(unsampled, features, setup)
    if missing:
        rows, columns = config.memory.tiles or WHOLE
        with usage.stage("decode"):
            decoder = plan.weights.load_decoder(device, dtype)
            for cell in tqdm(missing, "decode", leave=False):
                latents = load_tensors(cell.latents)["latents"]
                metadata = file_metadata(cell.request, cell.common) if config.sample.metadata else {}
                frames = decoded_frames(decoder, latents, None, (rows, columns))
                write_video(cell.request.video, frames, encoding=cell.request.encoding, metadata=metadata)
                save_settings(cell.request, cell.common, usage)
                if not config.sample.save_latents:
                    cell.latents.unlink()
                yield cell.request.video
            del decoder
            free_memory()
    yield from write_views(folder, cells)


def check_grid(config: RunConfig) -> list[Cell]:
    """Returns the cells in the order in which they are rendered, checked before a weight is read.

    Raises:
        MochiTuneError: of any kind, in one line.
    """
    sample = config.sample
    if sample.compare or sample.compile or PartialState(cpu=config.device == "cpu").num_processes > 1:
        raise ConfigError(
            "sample.grid=true renders in one process, uncompiled, and has strength 0 for the base: leave out "
            "sample.compare, sample.compile and parallel.num_processes, and use strengths=[0,1]."
        )
    if sample.strength_schedule or sample.block_strength or sample.init_video:
        raise ConfigError(
            "sample.grid=true has one strength for all steps and blocks of a cell, and starts from noise: leave out "
            "sample.strength_schedule, sample.block_strength and sample.init_video."
        )
    if sample.out and is_file_name(Path(sample.out)):
        raise ConfigError(f"out={sample.out} is a file, and a grid is a folder: name a folder.")
    if sample.format not in (None, "mp4", "webm"):
        raise ConfigError(f"sample.format={sample.format} is not for a grid: use mp4 or webm.")
    plans = {step: _check_plan(config, adapter) for step, adapter in _adapters(config).items()}
    if any(request.init_video for plan in plans.values() for request in plan.requests):
        raise ConfigError("sample.prompts has rows with init_video, and a grid starts from noise: leave them out.")
    strengths = list(dict.fromkeys(sample.strengths or [1.0]))
    if any(strengths) and sample.strengths and not any(each.adapters for each in plans.values()):
        raise ConfigError(f"sample.strengths={strengths} has no adapter: name adapter=FILE, or checkpoints=.")
    shapes = [[(len(a.adapter.layers), *(v.a.shape for v in a.adapter.layers.values())) for a in p.adapters]
              for p in plans.values()]  # fmt: skip
    if any(shape != shapes[0] for shape in shapes):
        raise ConfigError(f"checkpoints {', '.join(map(str, plans))} have other layers or ranks: render two grids.")
    cells = []
    for (step, plan), strength in itertools.product(plans.items(), strengths):
        entries = [entry | {"strength": strength * entry["strength"]} for entry in plan.common["adapters"]]
        common = plan.common | {"adapters": [entry for entry in entries if entry["strength"]]}
        common["side_by_side"] = ["adapted" if common["adapters"] else "base"]
        cells += [Cell(request, plan, step, strength, common) for request in plan.requests]
    return _with_files(cells, Path(sample.out) if sample.out else None, Path(config.run_dir) / "grids")


def _check_plan(config: RunConfig, adapter: str | None) -> RenderPlan:
    """Checks the videos of one checkpoint as `sample` does."""
    changes: dict[str, Any] = {"out": None, "grid": False, "strengths": None, "checkpoints": None}
    changes |= {} if adapter is None else {"adapter": adapter}
    return check(config.model_copy(update={"sample": config.sample.model_copy(update=changes)}), 1)


def _adapters(config: RunConfig) -> dict[int | None, str | None]:
    """Returns the adapter file of each checkpoint that is asked for, by step; {None: None} without."""
    sample, folder = config.sample, Path(config.run_dir) / "checkpoints"
    if sample.checkpoints is None:
        return {None: None}
    if sample.adapter is not None:
        raise ConfigError("sample.checkpoints are adapters of the run, and sample.adapter names others: leave one out.")
    found = {step_of(path): path for path in find_checkpoints(folder)}
    steps = list(found) if sample.checkpoints == "all" else list(dict.fromkeys(sample.checkpoints))
    if unknown := [step for step in steps if step not in found] or ([] if steps else ["all"]):
        there = f"those of steps {', '.join(map(str, found))}" if found else "none"
        raise ConfigError(f"sample.checkpoints: {unknown[0]} is not in {folder}, which has {there}.")
    if damage := [text for step in steps if (text := damage_of(found[step]))]:
        raise ConfigError(f"{damage[0]}: leave this step out of sample.checkpoints.")
    return {step: str(published_file(found[step])) for step in steps}


def _with_files(cells: Sequence[Cell], out: Path | None, grids: Path) -> list[Cell]:
    """Names each cell's file by all that determines it, so that an equal cell is found again and no other one is."""
    digests = [_digest(cell) for cell in cells]
    folder = out or grids / f"grid_{hashlib.sha256(''.join(digests).encode()).hexdigest()[:8]}"
    named = []
    for cell, digest in zip(cells, digests, strict=True):
        # NAME_seed_0_001 says the seed again, and a number that the digest stands for.
        words = cell.request.video.stem.rpartition("_")[0]
        of_step = "" if cell.checkpoint is None or not cell.strength else f"_step_{cell.checkpoint}"
        name = f"{words}{of_step}_strength_{cell.strength:g}_{digest[:10]}.{cell.request.encoding.format}"
        named.append(replace(cell, request=replace(cell.request, video=folder / "cells" / name)))
    return named


def _digest(cell: Cell) -> str:
    record = {key: value for key, value in describe(cell.request, cell.common).items() if key not in NOT_OF_A_CELL}
    # The same bytes under another name are the same adapter.
    record["adapters"] = [{k: v for k, v in each.items() if k != "file"} for each in record["adapters"]]
    content = json.dumps([record, asdict(cell.request.encoding)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def is_done(cell: Cell) -> bool:
    """Whether a cell's video is there, with its settings, which are written last."""
    return cell.request.video.exists() and cell.request.video.with_suffix(".json").exists()


def render_cells(cells: Sequence[Cell], features: dict[str, torch.Tensor], setup: Setup) -> None:
    """Samples cells and saves the latents of each as soon as it is finished.

    Raises:
        KeyboardInterrupt: it was asked to stop.
    """
    # Adapters of the right layers and ranks, for the numbers of every cell.
    start = next((cell.adapters for cell in cells if cell.adapters), {})
    weights, named = cells[0].plan.weights, {name: (*pair, {}) for name, pair in start.items()}
    dit, guide = prepare_dit(weights.load_dit, named, setup, weights.read_fp8), choose_guide(setup)
    groups = itertools.groupby(cells, key=lambda cell: (cell.checkpoint, cell.strength))
    count = 0
    with StopSignal() as stop:
        for _, group in groups:
            for number, cell in enumerate(group):
                if number == 0:
                    change_adapters(dit, cell.adapters)
                    switch_adapters(dit, bool(cell.adapters))
                request, count = cell.request, count + 1
                prompts = features[request.prompt], features[request.negative_prompt]
                steps = sample_latents(dit, noise_of(request), *prompts, request.settings, guide)
                latents = torch.empty(0)
                for state in tqdm(steps, f"{count}/{len(cells)}", request.settings.steps, unit="step", leave=False):
                    latents = state
                    if stop.received:
                        write_line(f"stopped: {count - 1} of {len(cells)} are kept; the same command goes on")
                        raise KeyboardInterrupt
                check_latents(request, {"adapted": latents})
                save_latents(request, {"adapted": latents.cpu()})
    del dit
    free_memory()


def write_views(folder: Path, cells: Sequence[Cell]) -> Iterator[Path]:
    """Writes the page and the video of all cells, yielding each."""
    shown = [_labelled(cell, cells) for cell in cells]
    # Rows by prompt first, whatever the order of rendering.
    order = {cell.request.prompt: number for number, cell in reversed(list(enumerate(cells)))}
    shown.sort(key=lambda cell: order[cell.prompt])
    columns = list(dict.fromkeys(cell.column for cell in shown))
    rows: dict[tuple[str, str], list[Path | None]] = {}
    for cell in shown:
        line = rows.setdefault((cell.prompt, cell.row), [None] * len(columns))
        line[columns.index(cell.column)] = cell.video
    tiles = [Tile(f"{row}\n{prompt}".strip(), videos) for (prompt, row), videos in rows.items()]
    yield write_grid_video(folder, tiles, columns)
    yield write_grid_page(folder, shown, columns)


def _labelled(cell: Cell, cells: Sequence[Cell]) -> GridCell:
    """Returns where a cell stands and what is written there: strengths, checkpoints or seeds side by side."""
    sizes = {(c.request.num_frames, c.request.height, c.request.width) for c in cells}
    settings = list(dict.fromkeys(_settings_of(c.request) for c in cells))
    axes = {"seed": f"seed {cell.request.seed}"}
    if cell.checkpoint is not None:
        axes["checkpoint"] = f"step {cell.checkpoint}"
    if len({c.strength for c in cells}) > 1 or cell.strength != 1:
        axes["strength"] = f"strength {cell.strength:g}"
    counts = {"seed": len({c.request.seed for c in cells}), "checkpoint": len({c.checkpoint for c in cells}),
              "strength": len({c.strength for c in cells})}  # fmt: skip
    across = next((axis for axis in ("strength", "checkpoint", "seed") if counts[axis] > 1), "seed")
    row = [label for axis, label in axes.items() if axis != across]
    if len(sizes) > 1:
        row.append(f"{cell.request.num_frames} frames of {cell.request.height}x{cell.request.width}")
    if len(settings) > len({c.request.prompt for c in cells}):
        row.append(f"settings {settings.index(_settings_of(cell.request)) + 1}")
    return GridCell(cell.request.prompt, ", ".join(row), axes.get(across, ""), cell.request.video)


def _settings_of(request: Request) -> Request:
    return replace(request, seed=0, video=Path())


def is_grid(sample: SampleConfig) -> bool:
    """Whether a grid is asked for.

    Raises:
        ConfigError: an axis of a grid is given without it.
    """
    for key in ("strengths", "checkpoints"):
        if getattr(sample, key) is not None and not sample.grid:
            raise ConfigError(f"sample.{key} is an axis of a grid: add grid=true.")
    return sample.grid
