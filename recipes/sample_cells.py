"""The videos of a grid or a farm: named by a hash of all that determines them, rendered by one process."""

import contextlib
import hashlib
import itertools
import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from mochi_tune.adapters.lora import change_adapters, switch_adapters
from mochi_tune.config.load import RunConfig
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.files import load_tensors, read_json
from mochi_tune.models.device import DTYPES, find_device, free_memory
from mochi_tune.models.text_encoder import prompt_dtype
from mochi_tune.models.vae_streaming import WHOLE
from mochi_tune.parallel.memory import PRECISIONS
from mochi_tune.recipes.sample import check_latents, encode_prompts, write_line
from mochi_tune.recipes.sample_claims import claimed
from mochi_tune.recipes.sample_plan import RenderPlan, check_each, choose_residency
from mochi_tune.sampling.formats import is_file_name
from mochi_tune.sampling.prompt_cache import PromptCache
from mochi_tune.sampling.record import (
    Usage,
    describe,
    determinants,
    explain_out_of_memory,
    file_metadata,
    noise_of,
    save_latents,
    save_settings,
)
from mochi_tune.sampling.render import Setup, choose_guide, decoded_frames, prepare_dit
from mochi_tune.sampling.requests import Request
from mochi_tune.sampling.sampler import sample_latents
from mochi_tune.sampling.video import write_video
from mochi_tune.training.checkpoint import damage_of, find_checkpoints, published_file, step_of
from mochi_tune.training.interrupts import Interrupted, StopSignal
from mochi_tune.weights.headers import read_header

# Entries of a video's settings that do not change its content.
NOT_OF_A_CELL = ("memory", "layout")


@dataclass(frozen=True)
class Cell:
    """One video of a grid.

    Attributes:
        request: prompt, seed and settings; its video is a file in the grid's folder.
        plan: the plan with the adapters of its checkpoint.
        checkpoint: the step of the adapter; None if it is not from a checkpoint of the run.
        strength: factor on the strengths of the adapters.
        common: settings that all cells of its plan and strength share.
        keeps_latents: whether its latents are kept after decoding.
    """

    request: Request
    plan: RenderPlan
    checkpoint: int | None
    strength: float
    common: dict[str, Any]
    keeps_latents: bool

    @property
    def latents(self) -> Path:
        """The file of its latents, which exists until the cell is decoded; `save_latents` keeps it."""
        return self.request.video.with_suffix(".safetensors")

    @property
    def adapters(self) -> dict[str, tuple[Any, float]]:
        """Layers and strength of each adapter, by name; empty for the base."""
        pairs = [(each.adapter.layers, self.strength * each.strength) for each in self.plan.adapters if each.strength]
        return {f"adapter_{i}": pair for i, pair in enumerate(pairs)} if self.strength else {}


def check_cells(config: RunConfig) -> list[Cell]:
    """Returns the cells in rendering order, checked before a weight is read.

    Raises:
        MochiTuneError: anything does not fit.
    """
    sample, parallel = config.sample, config.parallel
    asked = "sample.grid=true" if sample.grid else _name_farm(config)
    started = PartialState(cpu=config.device == "cpu").num_processes
    if started > 1:
        raise ConfigError(
            f"{asked} runs as one process, and {started} were started together: start it as one process, or start "
            "several of them with parallel.shard=1/N to N/N."
        )
    is_split = parallel.engine != "ray" and parallel.num_processes > 1
    for key, is_given, reason in (
        ("sample.compare", sample.compare, "compares by strengths=[0,1], with 0 for the base"),
        ("sample.compile", sample.compile, "does not compile the model"),
        ("sample.latents", sample.latents, "samples its videos"),
        ("parallel.num_processes", is_split, "renders each video in one process"),
    ):
        if is_given:
            raise ConfigError(f"{asked} {reason}: leave out {key}.")
    if sample.strength_schedule or sample.block_strength or sample.init_video:
        raise ConfigError(
            f"{asked} has one strength for all steps and blocks of a video, and starts from noise: leave out "
            "sample.strength_schedule, sample.block_strength and sample.init_video."
        )
    if sample.out and is_file_name(Path(sample.out)):
        raise ConfigError(f"out={sample.out} is a file, and {asked} fills a folder: name a folder.")
    if sample.grid and sample.format not in (None, "mp4", "webm"):
        raise ConfigError(f"sample.format={sample.format} is not for a grid: use mp4 or webm.")
    changes: dict[str, Any] = {"out": None, "grid": False, "strengths": None, "checkpoints": None}
    found = _adapters(config)
    samples = [sample.model_copy(update=changes | ({"adapter": file} if file else {})) for file in found.values()]
    plans = dict(zip(found, check_each(config, samples, 1), strict=True))
    requests = [request for plan in plans.values() for request in plan.requests]
    if any(request.init_video for request in requests):
        raise ConfigError(f"sample.prompts has rows with init_video, and {asked} starts from noise: leave them out.")
    if any(request.encoding.format == "png" and request.num_frames > 1 for request in requests):
        raise ConfigError(f"sample.format=png makes a folder of each video, and {asked} files: use webp or mp4.")
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
        cells += [Cell(request, plan, step, strength, common, sample.save_latents) for request in plan.requests]
    return _with_files(cells, config)


def is_farm(config: RunConfig) -> bool:
    """Whether several workers or several runs share the videos."""
    return config.parallel.engine == "ray" or config.parallel.shard is not None


def _name_farm(config: RunConfig) -> str:
    parallel = config.parallel
    return "parallel.engine=ray" if parallel.engine == "ray" else f"parallel.shard={parallel.shard}"


def _adapters(config: RunConfig) -> dict[int | None, str | None]:
    """Returns the adapter file of each checkpoint in the settings, by step; {None: None} if they name none."""
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


def _with_files(cells: Sequence[Cell], config: RunConfig) -> list[Cell]:
    """Names each cell's file by a hash of all that determines it, so that exactly equal cells share a file."""
    # All plans have the same weights and differ only in their adapters.
    weights = cells[0].plan.fingerprints
    out, run_dir, metadata = config.sample.out, Path(config.run_dir), config.sample.metadata
    digests = [_digest(cell, weights, metadata) for cell in cells]
    if config.sample.grid:
        of_all = hashlib.sha256("".join(digests).encode()).hexdigest()[:8]
        folder = (Path(out) if out else run_dir / "grids" / f"grid_{of_all}") / "cells"
    else:
        folder = Path(out) if out else run_dir / "samples"
    named = []
    for cell, digest in zip(cells, digests, strict=True):
        # The end of NAME_seed_0_001 is replaced by the digest.
        words = cell.request.video.stem.rpartition("_")[0]
        of_step = "" if cell.checkpoint is None or not cell.strength else f"_step_{cell.checkpoint}"
        name = f"{words}{of_step}_strength_{cell.strength:g}_{digest[:10]}.{cell.request.encoding.format}"
        common = cell.common | {"weights": weights}
        named.append(replace(cell, request=replace(cell.request, video=folder / name), common=common))
    return named


def _digest(cell: Cell, weights: Mapping[str, str], metadata: bool) -> str:
    everything = determinants(cell.request, cell.common)
    memory = everything["memory"]
    record: dict[str, Any] = {key: value for key, value in everything.items() if key not in NOT_OF_A_CELL}
    record["weights"] = weights
    # Where the weights are does not change the result; their precision and tiles do.
    record["precision"] = memory["dit"] if memory["dit"] in PRECISIONS else "exact"
    record["tiles"] = memory["tiles"]
    if memory["t5_dtype"] == "int8":
        record["t5"] = "int8"
    # The same adapter may be at another path.
    record["adapters"] = [{k: v for k, v in each.items() if k != "file"} for each in record["adapters"]]
    # A file with metadata is not the same as one without.
    parts = [record, asdict(cell.request.encoding), *([] if metadata else ["no metadata"])]
    content = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def is_done(cell: Cell) -> bool:
    """Whether a cell's video, its settings (written last) and, if kept, its latents exist and are not empty."""
    video = cell.request.video
    with contextlib.suppress(CheckpointError, FileNotFoundError):
        read_json(video.with_suffix(".json"))
        return video.stat().st_size > 0 and (has_latents(cell) or not cell.keeps_latents)
    return False


def has_latents(cell: Cell) -> bool:
    """Whether a cell's latents exist and are complete."""
    with contextlib.suppress(CheckpointError):
        return bool(read_header(cell.latents))
    return False


class CellRenderer:
    """Samples and decodes cells one at a time; holds one model at a time, loaded when a cell needs it.

    Args:
        config: settings of the run.
        cells: all cells that may be rendered.
        usage: seconds and memory of each stage, for the settings of each video.
    """

    def __init__(self, config: RunConfig, cells: Sequence[Cell], usage: Usage) -> None:
        self._config, self._plan, self.usage = config, cells[0].plan, usage
        self._device, self._dtype = usage.device, DTYPES[config.model.dtype]
        self._t5_dtype = prompt_dtype(config.memory.t5_dtype, self._dtype)
        self._prompts = Path(config.sample.prompt_cache).expanduser()
        # Adapters with the layers and ranks of every cell; each cell sets its own weights.
        self._start = next((cell.adapters for cell in cells if cell.adapters), {})
        self._residency = ""
        self._part, self._model, self._applied = "", None, None

    @explain_out_of_memory("text")
    def encode(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        """Returns the features of the prompts of requests, from the prompt cache or by T5."""
        plan = replace(self._plan, requests=list(requests))
        cache = PromptCache(self._prompts, plan.weights.fingerprint("text_encoder"), self._t5_dtype)
        if not all(cache.path(prompt).exists() for prompt in plan.prompts):
            self.free()
        return encode_prompts(plan, self._device, self._t5_dtype, self._prompts)

    def choose_residency(self) -> str:
        """Returns where the DiT's weights are during sampling, as `sample.choose_residency`."""
        if not self._residency:
            self._residency = choose_residency(self._config, self._plan, self._device, may_compile=False)
        return self._residency

    @explain_out_of_memory("sample")
    def sample(
        self, cell: Cell, features: dict[str, Tensor], label: str, is_stopped: Callable[[], object] = bool
    ) -> None:
        """Samples a cell and saves its latents.

        Args:
            cell: the cell to sample.
            features: features of its prompts, by prompt.
            label: label of the progress bar; "" for no bar.
            is_stopped: called after each step; a true result stops sampling.

        Raises:
            Interrupted: `is_stopped` returned a true value.
        """
        request, dit = cell.request, self._load("dit")
        if self._applied != (applied := (cell.checkpoint, cell.strength)):
            change_adapters(dit, cell.adapters)
            switch_adapters(dit, bool(cell.adapters))
            self._applied = applied
        prompts = features[request.prompt], features[request.negative_prompt]
        guide = choose_guide(self._setup())
        latents = torch.empty(0)
        steps = sample_latents(dit, noise_of(request), *prompts, request.settings, guide)
        for state in tqdm(steps, label, request.settings.steps, unit="step", leave=False, disable=not label):
            latents = state
            if is_stopped():
                raise Interrupted
        check_latents(request, {"adapted": latents})
        save_latents(cell.latents, {"adapted": latents.cpu()}, describe(request, cell.common))

    @explain_out_of_memory("decode")
    def decode(self, cell: Cell) -> None:
        """Decodes the latents of a cell; its video appears when it is complete, then its settings."""
        request, tiles = cell.request, self._config.memory.tiles or WHOLE
        latents, record = load_tensors(cell.latents)["latents"], describe(request, cell.common)
        metadata = file_metadata(record) if self._config.sample.metadata else {}
        frames = decoded_frames(self._load("decoder"), latents, None, (tiles[0], tiles[1]))
        write_video(request.video, frames, fps=request.fps, encoding=request.encoding, metadata=metadata)
        save_settings(request, record, self.usage)
        if not cell.keeps_latents:
            cell.latents.unlink()

    def free(self) -> None:
        """Frees the model."""
        self._part, self._model, self._applied = "", None, None
        free_memory()

    def _setup(self) -> Setup:
        return Setup(self._device, self._dtype, self.choose_residency())

    def _load(self, part: str) -> Any:
        """Returns the model of a part, after freeing the other one."""
        if self._part != part:
            self.free()
            weights = self._plan.weights
            if part == "dit":
                named = {name: (*pair, {}) for name, pair in self._start.items()}
                self._model = prepare_dit(weights.load_dit, named, self._setup(), weights.read_fp8)
            else:
                self._model = weights.load_decoder(self._device, self._dtype)
            self._part = part
        return self._model


def render_here(config: RunConfig, cells: Sequence[Cell]) -> Iterator[Path]:
    """Renders cells in this process, yielding each video when it is written.

    Cells that another process has claimed are skipped.

    Raises:
        KeyboardInterrupt: a signal stopped it; finished latents and videos are kept.
    """
    usage = Usage(find_device(config.device), write_line)
    renderer, plan = CellRenderer(config, cells, usage), cells[0].plan
    trouble: Exception | None = None
    if unsampled := [cell for cell in cells if not has_latents(cell)]:
        held = plan.held(renderer.choose_residency(), DTYPES[config.model.dtype].itemsize, is_compiled=False)
        with usage.stage("text"):
            features = renderer.encode([cell.request for cell in unsampled])
        with usage.stage("sample", held), StopSignal() as stop:
            for number, cell in enumerate(unsampled, 1):
                try:
                    with claimed(cell.request.video) as is_mine:
                        if is_mine and not (is_done(cell) or has_latents(cell)):
                            renderer.sample(cell, features, f"{number}/{len(unsampled)}", lambda: stop.received)
                except Interrupted:
                    write_line(f"stopped: {number - 1} of {len(unsampled)} are kept; the same command continues")
                    # The exit code tells a scheduler that it ended the job, which it then queues again.
                    raise KeyboardInterrupt(128 + stop.received) from None
                except Exception as error:
                    if number == 1:
                        raise
                    trouble = error
                    write_line(f"video {number} of {len(unsampled)} failed; the ones before it are decoded first")
                    # The frames of the error keep the model alive.
                    traceback.clear_frames(error.__traceback__)
                    break
    with usage.stage("decode"):
        for cell in tqdm(cells, "decode", leave=False):
            with claimed(cell.request.video) as is_mine:
                is_due = is_mine and not is_done(cell) and has_latents(cell)
                if is_due:
                    renderer.decode(cell)
            if is_due:
                yield cell.request.video
    renderer.free()
    if trouble is not None:
        raise trouble
