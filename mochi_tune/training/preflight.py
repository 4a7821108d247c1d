"""The train plan: everything about a training that can be decided and checked before any weight is read."""

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from mochi_tune.adapters.files import Adapter, check_adapter, load_adapter
from mochi_tune.adapters.layers import check_start
from mochi_tune.adapters.lora import LayerSettings, all_linear_shapes, linear_shapes
from mochi_tune.config.load import weights_paths
from mochi_tune.config.lora import lora_settings
from mochi_tune.config.schema import RunConfig
from mochi_tune.config.settings import flat_settings, resume_rule
from mochi_tune.config.sources import buckets_by_source, prepared_settings
from mochi_tune.data.buckets import Bucket
from mochi_tune.data.cache import Cache, open_cache
from mochi_tune.data.dataset import LatentDataset
from mochi_tune.data.order import ClipOrder
from mochi_tune.errors import DataError
from mochi_tune.files import file_sha256
from mochi_tune.models.device import DTYPES, find_device
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.parallel.forecast import Card, Step, free_bytes
from mochi_tune.parallel.forecast_context import TRAINING, card_here, sharing_seconds
from mochi_tune.parallel.mesh import Layout, training_layout
from mochi_tune.parallel.precision import check_precision, shrink_block
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.training.accelerator import check_deepspeed, check_strategy, host_memory
from mochi_tune.training.agreement import check_agreement, versions
from mochi_tune.training.checkpoint import find_checkpoints
from mochi_tune.training.draws import KeyedDraws, generator_fingerprint
from mochi_tune.training.loader import check_replacing
from mochi_tune.training.memory_plan import (
    KEEP_WEIGHTS,
    MemoryPlan,
    arrange,
    check_host_memory,
    check_streaming,
    explain_out_of_memory,
)
from mochi_tune.training.optim import check_installed
from mochi_tune.training.preflight_clips import choose_held_out, clip_order, largest_clip, measured_clips
from mochi_tune.training.run_folder import describe_environment
from mochi_tune.training.trackers import check_trackers
from mochi_tune.weights.folder import WeightsFolder


@dataclass(frozen=True)
class TrainPlan:
    """The plan of a training.

    Attributes:
        config: the settings.
        device: the device of this process.
        weights: the weights of the base model.
        dataset: all clips of the cache.
        held_out: indices of the clips that are held out for validation; empty if there are too few clips.
        order: the order of the training clips.
        layers: the settings of each adapted layer, by name.
        start_adapter: the adapter of lora.init_from, if a new run starts from one.
        draws: draws the random numbers.
        identity: what identifies the run: its settings, cache, order of clips, base and random numbers.
        layout: how the processes share a step.
        largest: the size of the largest clips, which determines the memory.
    """

    config: RunConfig
    device: torch.device
    weights: WeightsFolder
    dataset: LatentDataset
    held_out: list[int]
    order: ClipOrder
    layers: dict[str, LayerSettings]
    start_adapter: Adapter | None
    draws: KeyedDraws
    identity: dict
    layout: Layout
    largest: Bucket

    @property
    def training_clips(self) -> list[int]:
        """Indices of the training clips."""
        return sorted(clip for pool in self.order.pools for clip in pool.clips)

    @cached_property
    def validation_clips(self) -> list[int]:
        """Indices of the validation clips: of those that are held out, or else of the training clips."""
        count = self.config.train.validation_clips
        return measured_clips(self.config.data, self.dataset.cache, self.held_out, count)

    @property
    def renders_videos(self) -> bool:
        """Whether the run renders eval videos."""
        return renders_videos(self.config)

    @cached_property
    def adapter_bytes(self) -> int:
        """The size of the adapter's fp32 parameters."""
        return adapter_bytes(linear_shapes(self.weights.dit_skeleton()), self.layers, self.config.lora.dora)

    @property
    def precision(self) -> str:
        """Precision of the base's large matrices; "bf16" leaves them in model.dtype."""
        return self.config.model.precision or "bf16"

    @property
    def has_host_modulation(self) -> bool:
        """Whether modulation is computed in host memory; not with ZeRO-3, which shards its weights too."""
        return self.config.parallel.strategy != "zero3"

    def shrink_block(self, dit: AsymmDiT, block: nn.Module) -> None:
        """Moves the modulation of a block to host memory and quantizes its large matrices, as soon as it is read."""
        shrink_block(dit, block, self.precision, self.weights.read_fp8, self.has_host_modulation)

    @property
    def step(self) -> Step:
        """The sizes of a micro-batch, which determine its memory and time."""
        dit, on_gpu = self.weights.dit_config, self.device.type == "cuda"
        return step_sizes(self.config, dit, self.largest.num_tokens, self.adapter_bytes, self.layout, on_gpu)

    @cached_property
    def memory(self) -> MemoryPlan:
        """The memory plan. It is made once, because free memory changes later.

        All processes read this together. It initializes the GPU and thereby uses some of its memory, so a process that
        only starts others must not read it.

        Raises:
            ConfigError: the memory of the host or of the device does not suffice.
        """
        memory, step, is_gpu = self.config.memory, self.step, self.device.type == "cuda"
        # This is a collective, so it comes before errors that only one process may raise.
        available, num_sharing = host_memory() if is_gpu else (0, 1)
        plan = arrange(step, memory.dit, memory.activations, free_bytes(self.device))
        if is_gpu:
            needed = step.weights["modulation"] if self.has_host_modulation else 0
            needed += step.host_bytes(plan.is_streamed, plan.offloads_inputs)
            check_host_memory(needed, available, num_sharing)
        return plan

    @property
    def may_recompute_more(self) -> bool:
        """Whether to repeat a micro-batch that ran out of memory.

        This requires train.recompute=auto and passes without communication. All processes read this together, as
        `memory`.
        """
        is_alone = self.layout.context == 1 and self.config.parallel.strategy == "data"
        return is_alone and self.config.train.recompute == "auto" and self.memory.can_keep_less

    def check_agreement(self) -> None:
        """Checks that all processes have the same settings, weights and clips; all call this together.

        Raises:
            ParallelError: they differ; the error names what differs and the ranks.
        """
        if self.layout.num_ranks > 1:
            check_agreement(self._shared_facts())

    def _shared_facts(self) -> dict[str, object]:
        identity, settings = self.identity, self.identity["settings"]
        facts = {f"the setting {key}": settings[key] for key in bound_settings(settings)}
        facts |= {"the cache": identity["cache"], "the order of the clips": identity["order"]}
        facts |= {"the random numbers of torch": identity["draws"], "the base": identity["base"]}
        # The best split depends on the GPU.
        facts["how processes share a step"] = self.layout.in_words
        facts |= versions("deepspeed") if self.config.parallel.strategy != "data" else {}
        # T5 and the encoder are compared with the cache, and only the main process uses the decoder.
        facts["the files of the dit in model.weights"] = self.weights.fingerprint("dit")
        if self.start_adapter is not None:
            assert self.start_adapter.path is not None, "it was read from a file"
            facts["the adapter lora.init_from"] = file_sha256(self.start_adapter.path)
        return facts

    def explains_out_of_memory(self) -> contextlib.AbstractContextManager:
        """Returns a context that replaces out-of-memory errors, see `explain_out_of_memory`."""
        return explain_out_of_memory(self.step, self.memory)

    @property
    def environment(self) -> dict[str, object]:
        """What the numbers of the run depend on in addition to its settings."""
        return describe_environment(self.config.parallel.strategy, self.device, self.layout.num_ranks)


def check(config: RunConfig, num_processes: int) -> TrainPlan:
    """Checks everything that can be checked before any weight is read, which takes seconds, and returns the plan.

    Raises:
        MochiTuneError: a setting, the cache, the weights or the machine is not suitable.
    """
    train, device = config.train, find_device(config.device)
    sampler_settings(config.sample)
    check_precision(config.model.precision or "bf16", device)
    weights = WeightsFolder(weights_paths(config))
    weights.check(["dit", "decoder", "text_encoder"] if renders_videos(config) else ["dit"])
    skeleton = weights.dit_skeleton()
    cache = _open_cache(config, weights)
    dataset = LatentDataset(cache)
    check_text_width(dataset, skeleton.config.t5_feat_dim)
    check_installed(train.optimizer)
    check_trackers(config.log)
    shapes = linear_shapes(skeleton)
    layers = lora_settings(config.lora, shapes)
    check_strategy(config.parallel.strategy, num_processes)
    check_deepspeed(config.parallel.strategy)
    context = config.parallel.context or 1
    largest = largest_clip(cache)
    layout = training_layout(num_processes, context, skeleton.config, largest.num_tokens, card_here())
    check_replacing(config.data.damaged, config.parallel.strategy, layout.context)
    draws = KeyedDraws(
        config.seed, train.batch_size, train.accumulation_steps * layout.data, train.caption_dropout,
        train.sigma_stratified,
    )  # fmt: skip
    base = weights.base_identity()
    start = None
    if config.lora.init_from is not None and not find_checkpoints(Path(config.run_dir) / "checkpoints"):
        start = load_adapter(config.lora.init_from)
        check_adapter(start, all_linear_shapes(skeleton), base)
        check_start(start.layers, layers, config.lora.dora, str(start))
    count = train.validation_clips if train.validate_every else 0
    held = choose_held_out(config.data, cache, count, config.seed)
    order = clip_order(config.data, cache, held, train.batch_size, config.seed)
    # What is learnt depends on the number of samples per step, not on how the processes share them.
    global_batch = train.batch_size * draws.num_micro_batches
    settings = flat_settings(config) | {"global_batch": global_batch, "held_out": len(held)}
    if config.model.precision == "bf16":  # The same as null, with this dtype.
        settings["model.precision"] = None
    fingerprint = generator_fingerprint(config.seed)
    identity = {"settings": settings, "cache": cache.fingerprint, "base": base, "draws": fingerprint}
    identity["order"] = order.fingerprint(cache.rows.column("sample_id"))
    check_streaming(config.memory.dit, config.parallel.strategy, train.recompute)
    return TrainPlan(config, device, weights, dataset, held, order, layers, start, draws, identity, layout, largest)


def adapter_bytes(shapes: dict[str, tuple[int, int]], layers: dict[str, LayerSettings], is_dora: bool) -> int:
    """Returns the size of the fp32 parameters of an adapter in bytes.

    Args:
        shapes: (out, in) of each linear layer, by name.
        layers: the settings of each adapted layer, by name.
        is_dora: whether the adapter is a DoRA, which also has a magnitude per output.
    """
    return 4 * sum(
        layer.rank * sum(shapes[name]) + (shapes[name][0] if is_dora else 0) for name, layer in layers.items()
    )


def step_sizes(
    config: RunConfig, dit: DiTConfig, num_tokens: int, num_adapter_bytes: int, layout: Layout, is_gpu: bool
) -> Step:
    """Returns the sizes of a micro-batch of clips of `num_tokens` on one of the processes of a layout."""
    train, is_zero3 = config.train, config.parallel.strategy == "zero3"
    is_compiled = is_gpu if train.compile is None else train.compile
    return Step(
        dit,
        num_tokens * train.batch_size // layout.context,
        num_adapter_bytes,
        dtype_bytes=DTYPES[config.model.dtype].itemsize,
        precision=config.model.precision or "bf16",
        recompute=train.recompute,
        is_compiled=is_compiled and not is_zero3,
        holds_modulation=is_zero3,
        num_shards=layout.num_ranks if is_zero3 else 1,
        may_stream=config.parallel.strategy not in KEEP_WEIGHTS,
        split=layout.split,
        num_clips=train.batch_size,
        needs_exact=config.lora.dora,
        optimizer=train.optimizer,
        has_average=bool(train.ema_decay),
    )


def step_seconds(
    config: RunConfig,
    step: Step,
    shares: Mapping[Bucket, float],
    policies: Sequence[str],
    card: Card,
    is_streamed: bool,
) -> float:
    """Returns the estimated seconds of a training step.

    Args:
        config: the settings.
        step: the sizes of a micro-batch.
        shares: the share of each size of clips among the samples.
        policies: what each block recomputes.
        card: the GPU.
        is_streamed: whether the weights of the blocks are in host memory.
    """
    sized = {b: replace(step, num_tokens=step.num_clips * b.num_tokens // math.prod(step.split)) for b in shares}
    mean = 0.0
    for bucket, share in shares.items():
        mean += share * sized[bucket].seconds(policies, card, is_streamed)
        if step.split != (1, 1):
            mean += share * sharing_seconds(step.split, step.config, bucket.num_tokens, card, TRAINING)
    return config.train.accumulation_steps * mean


def _open_cache(config: RunConfig, weights: WeightsFolder) -> Cache:
    # The training machine need not have the encoders. If it has, the cache must come from them.
    vae, t5 = (weights.fingerprint(part) if weights.has(part) else None for part in ("encoder", "text_encoder"))
    settings = prepared_settings(config.data)
    return open_cache(Path(config.data.cache), buckets_by_source(config.data), vae, t5, settings)


def check_text_width(dataset: LatentDataset, width: int) -> None:
    """Refuses a cache whose text features have another width than those that the DiT takes.

    Raises:
        DataError: the widths differ.
    """
    found = dataset.cache.text_width()
    if found != width:
        raise DataError(
            f"the cache {dataset.cache.folder} has text features of width {found}, but the DiT takes {width}: "
            "run `mochi-tune prepare` with this model, or name another folder in data.cache."
        )


def renders_videos(config: RunConfig) -> bool:
    """Whether a training renders eval videos."""
    return bool(config.train.sample_every and config.train.sample_prompts)


def adapter_metadata(plan: TrainPlan, step: int) -> dict[str, str]:
    """Returns the metadata of an adapter file: its base, layers and step, and a hash of its settings."""
    config, settings = plan.config, plan.identity["settings"]
    learnt = json.dumps({key: settings[key] for key in bound_settings(settings)}, sort_keys=True)
    return {
        "base_model": config.model.name,
        "base_fingerprint": plan.identity["base"],
        "num_blocks": str(plan.weights.dit_config.depth),
        "targets": json.dumps(list(config.lora.targets)),
        "step": str(step),
        "config_hash": hashlib.sha256(learnt.encode()).hexdigest(),
        "name": config.name,
        **{f"modelspec.{key}": value for key, value in _description(plan, step).items() if value},
    }


def _description(plan: TrainPlan, step: int) -> dict[str, str | None]:
    """Returns the metadata of the adapter by the keys of ModelSpec.

    There is no date, so that the same run always writes the same file. `export` adds the date of the run.
    """
    config, size, publish = plan.config, plan.largest, plan.config.publish
    trigger = config.data.caption_prefix.strip(" ,.;:") if publish.trigger is None else publish.trigger
    return {
        "title": publish.title or config.name,
        "author": publish.author,
        "license": publish.license,
        "trigger_phrase": trigger,
        "resolution": f"{size.width}x{size.height}",
        "description": f"LoRA of {config.model.name}, {step} steps on clips of up to {size.num_frames} frames.",
    }


def bound_settings(settings: dict | list[str]) -> list[str]:
    """Returns the settings that decide what is learnt."""
    return [key for key in settings if resume_rule(key) != "free"]
