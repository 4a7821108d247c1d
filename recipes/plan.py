"""Estimates a run before anything is loaded: memory of each stage, time, disk, and settings that fit the GPU."""

import math
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from mochi_tune import assets
from mochi_tune.adapters.lora import linear_shapes
from mochi_tune.config.load import weights_paths
from mochi_tune.config.lora import lora_settings
from mochi_tune.config.sample import sample_size
from mochi_tune.config.schema import RunConfig
from mochi_tune.config.sources import Source, buckets_by_source, largest_bucket, prepared_settings, read_sources
from mochi_tune.data.buckets import Bucket
from mochi_tune.data.cache import Cache, CacheVersionError, open_cache
from mochi_tune.data_prep.captions import CaptionRules, load_captions
from mochi_tune.data_prep.finding import list_videos
from mochi_tune.data_prep.hf_dataset import is_dataset
from mochi_tune.errors import ConfigError, ParallelError
from mochi_tune.models.device import DTYPES
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.latents import latent_shape, num_visual_tokens
from mochi_tune.models.text_encoder import MAX_TOKENS, T5_DTYPES, prompt_dtype
from mochi_tune.models.vae_streaming import check_tiles
from mochi_tune.parallel import forecast_advice
from mochi_tune.parallel.forecast import (
    CARDS,
    GIB,
    SAMPLING,
    SPARE_BYTES,
    Card,
    Step,
    encoding_held,
    encoding_seconds,
    fits,
    text_held,
)
from mochi_tune.parallel.forecast_context import find_card, sharing_seconds
from mochi_tune.parallel.forecast_sampling import (
    SamplingStep,
    decoding_held,
    decoding_seconds,
    sampling_held,
    sampling_seconds,
)
from mochi_tune.parallel.memory import SHARD_ALONE
from mochi_tune.parallel.mesh import Layout, Videos, choose_layout, training_layout
from mochi_tune.recipes.sample_plan import pays_for_tokens
from mochi_tune.sampling.requests import read_rows, sampler_settings
from mochi_tune.training.accelerator import check_strategy
from mochi_tune.training.loader import check_replacing
from mochi_tune.training.memory_plan import ARRANGEMENTS, arrange, can_stream, check_streaming
from mochi_tune.training.preflight import adapter_bytes, step_seconds, step_sizes
from mochi_tune.training.preflight_clips import bucket_shares, choose_held_out, clip_order, largest_clip
from mochi_tune.weights.configs import read_official_config
from mochi_tune.weights.folder import WeightsFolder

OFFICIAL = DiTConfig()
# Models to which the estimates do not apply: their steps take milliseconds, most of which are not arithmetic.
SMALL_MODELS = ("toy", "tiny")


@dataclass(frozen=True)
class Stage:
    """Bytes on the GPU in a stage of a run, by purpose, and its seconds if the speed of the card is known."""

    name: str
    held: dict[str, int]
    seconds: float | None = None
    per: str = ""

    @property
    def total(self) -> int:
        """All bytes, with the reserve."""
        return sum(self.held.values()) + SPARE_BYTES


@dataclass(frozen=True)
class Rendering:
    """Denoising in `sample`: visual tokens and bytes of a process, and seconds of a step if the speed is known.

    `is_compiled` is that of `sampling_held`.
    """

    num_tokens: int
    held: dict[str, int]
    seconds: float | None
    is_compiled: bool


@dataclass(frozen=True)
class RunForecast:
    """The estimate of a run.

    Attributes:
        clips: the training clips, in words.
        num_tokens: visual tokens of the largest clips.
        card: the GPU, in words.
        gib: memory of the GPU.
        stages: stages of prepare, train and sample.
        run_seconds: seconds of all training steps; None if the speed of the card is not known.
        presets: for each value of memory=, the bytes of `train` and `sample`; None where it does not apply.
        advice: settings to use, one line each.
        processes: how the processes share a training step, in words; "" for one process.
        cache_bytes, checkpoint_bytes: bytes on disk; 0 for the cache while the number of clips is not known.
    """

    clips: str
    num_tokens: int
    card: str
    gib: float
    stages: list[Stage]
    run_seconds: float | None
    presets: dict[str, tuple[int | None, int | None]]
    advice: list[str]
    processes: str
    cache_bytes: int
    checkpoint_bytes: int


def main(config: RunConfig, card: str = "", card_gib: int = 0) -> RunForecast:
    """Estimates a run on the GPU of this machine, or on another one.

    Args:
        config: settings of the run.
        card: one of `forecast.CARDS`, or another name with `card_gib`; "" for the GPU of this machine.
        card_gib: memory in GiB of a card that is not in the table.

    Raises:
        ConfigError: there is no GPU and no card is named, or the memory of an unknown card is missing.
    """
    sampler_settings(config.sample)
    check_streaming(config.memory.dit, config.parallel.strategy, config.train.recompute)
    check_strategy(config.parallel.strategy, config.parallel.num_processes)
    if config.memory.tiles is not None:
        check_tiles(config.memory.tiles, *sample_size(config.sample, config.data)[1:])
    words, gib, speed = find_card(card, card_gib)
    dit, free, advice = dit_sizes(config), int(gib * GIB), []
    if config.model.name in SMALL_MODELS:
        advice.append(f"model={config.model.name} is too small for these estimates: they do not apply to it")
        speed = None
    count, clips, shares, num_captions = count_clips(config)
    tokens, processes = max(size.num_tokens for size in shares), config.parallel
    layout = training_layout(processes.num_processes, processes.context or 1, dit, tokens, speed or CARDS["h100"])
    check_replacing(config.data.damaged, processes.strategy, layout.context)
    step = training_step(config, dit, tokens, layout)
    policies, arrangement, refused = arranged(config, step, free)
    advice += [f"train: {refused}"] if refused else []
    rendering, refused = plan_rendering(config, dit, step.dtype_bytes, free, speed)
    advice += [f"sample: {refused}"] if refused else []
    seconds = None if speed is None else step_seconds(config, step, shares, policies, speed, arrangement[0])
    stages = [
        Stage("train", step.held(policies, *arrangement), seconds, "a step"),
        Stage("sample: denoise", rendering.held, rendering.seconds, "a step"),
    ]
    # T5 and the VAE are only estimated at their official sizes.
    if dit.t5_feat_dim == OFFICIAL.t5_feat_dim:
        video = sample_size(config.sample, config.data)
        stages = [*stages_of_encoding(config, speed), *stages, *stages_of_decoding(config, video, speed)]
    advice += [
        advise(stage.name, config, dit, rendering, step.dtype_bytes, free)
        for stage in stages
        if not fits(stage.held, free)
    ]
    return RunForecast(
        clips=clips,
        num_tokens=tokens,
        card=words,
        gib=gib,
        stages=stages,
        run_seconds=None if seconds is None else seconds * config.train.steps,
        presets={name: preset_bytes(name, step, dit, rendering, free) for name in ("80gb", "24gb", "16gb", "12gb")},
        advice=list(filter(None, advice)) or ["every stage fits as it is set"],
        processes=layout.in_words if layout.num_ranks > 1 else "",
        cache_bytes=int(count * sum(share * clip_bytes(bucket, dit, num_captions) for bucket, share in shares.items())),
        checkpoint_bytes=checkpoint_bytes(config, step),
    )


def arranged(config: RunConfig, step: Step, free: int) -> tuple[list[str], tuple[bool, bool], str]:
    """Returns how training holds activations and weights, and why `train` would refuse it, or "".

    Returns:
        the recompute policy of each block; whether blocks are streamed and inputs offloaded; the error of `train`.
    """
    try:
        plan = arrange(step, config.memory.dit, config.memory.activations, free)
    except ConfigError as error:
        asked = (config.memory.dit in ("stream", "offload"), config.memory.activations == "offload")
        return step.policies(free, *asked), asked, str(error)
    return plan.recompute, (plan.is_streamed, plan.offloads_inputs), ""


def advise(stage: str, config: RunConfig, dit: DiTConfig, rendering: Rendering, dtype_bytes: int, free: int) -> str:
    """Returns the settings with which a stage fits; "" for training, whose advice is the error of `arrange`.

    Args:
        stage: name of the stage.
        config: settings of the run.
        dit: sizes of the DiT.
        rendering: the estimate of denoising in `sample`.
        dtype_bytes: bytes of a number of the model.
        free: free bytes of the GPU.
    """
    bucket, (_, height, width) = largest_bucket(config.data), sample_size(config.sample, config.data)
    if stage == "prepare: captions":
        return forecast_advice.for_captions(free)
    if stage == "prepare: clips":
        return forecast_advice.for_clips(bucket.num_frames, bucket.height, bucket.width, dtype_bytes, free)
    if stage == "sample: prompts":
        return forecast_advice.for_prompts(dtype_bytes, free)
    if stage == "sample: denoise":
        return forecast_advice.for_denoising(dit, rendering.num_tokens, dtype_bytes, free, rendering.is_compiled)
    return forecast_advice.for_decoding(height, width, dtype_bytes, free) if stage == "sample: decode" else ""


def stages_of_encoding(config: RunConfig, speed: Card | None) -> list[Stage]:
    """Returns the stages of `prepare`."""
    bucket = largest_bucket(config.data)
    clip = (bucket.num_frames, bucket.height, bucket.width)
    return [
        Stage("prepare: captions", text_held(T5_DTYPES[config.memory.t5_dtype].itemsize)),
        Stage(
            "prepare: clips",
            encoding_held(*clip, DTYPES[config.model.dtype].itemsize),
            None if speed is None else encoding_seconds(*clip, speed),
            "a clip",
        ),
    ]


def stages_of_decoding(config: RunConfig, video: tuple[int, int, int], speed: Card | None) -> list[Stage]:
    """Returns the stages of `sample` other than denoising."""
    dtype_bytes, (rows, columns) = DTYPES[config.model.dtype].itemsize, config.memory.tiles or (1, 1)
    return [
        Stage("sample: prompts", text_held(prompt_dtype(config.memory.t5_dtype, DTYPES[config.model.dtype]).itemsize)),
        Stage(
            "sample: decode",
            decoding_held(*video[1:], (rows, columns), dtype_bytes),
            None if speed is None else decoding_seconds(*video, speed),
            "a video",
        ),
    ]


def plan_rendering(
    config: RunConfig, dit: DiTConfig, dtype_bytes: int, free: int, speed: Card | None
) -> tuple[Rendering, str]:
    """Returns the estimate of denoising in `sample`, and why `sample` would refuse the layout, or ""."""
    tokens = num_visual_tokens(*sample_size(config.sample, config.data))
    layout, refused = rendering_layout(config, dit, tokens, speed or CARDS["h100"])
    # Tokens of one process.
    own, residency = -(-tokens // layout.context), config.memory.dit
    if residency == "auto":
        residency = "resident" if fits(sampling_held(dit, own, "resident", dtype_bytes), free) else "offload"
    scales, is_compiled = sampler_settings(config.sample).scales, config.sample.compile
    if is_compiled is None:
        is_compiled = pays_for_tokens(sum(1 + (scale != 1) for scale in scales) * tokens)
    # Only GPUs that multiply in fp8 round to it.
    is_compiled = is_compiled or (speed is not None and not speed.has_fp8)
    held = sampling_held(dit, own, residency, dtype_bytes, layout.guidance * layout.context, is_compiled)
    seconds = None if speed is None else rendering_seconds(config, dit, tokens, speed, layout, residency)
    return Rendering(own, held, seconds, is_compiled), refused


def rendering_layout(config: RunConfig, dit: DiTConfig, num_tokens: int, card: Card) -> tuple[Layout, str]:
    """Returns how the processes of `sample` share its videos, and why it would be refused, or ""."""
    parallel, sample = config.parallel, config.sample
    asked = {"data": parallel.data, "guidance": parallel.guidance, "context": parallel.context}
    is_guided = any(scale != 1 for scale in sampler_settings(sample).scales)
    # The file of prompts need not exist yet.
    prompts = Path(sample.prompts) if sample.prompts else None
    rows = [row for _, row in read_rows(prompts)] if prompts is not None and prompts.is_file() else [{}]
    count = sum(1 if "seed" in row else len(sample.seeds or [0]) for row in rows)
    videos = Videos(count, num_tokens, is_guided)
    try:
        layout = choose_layout(parallel.num_processes, dit, videos, asked, card)
    except ParallelError as error:
        return Layout(), str(error)
    if config.memory.dit == "shard" and layout.guidance * layout.context == 1:
        return layout, SHARD_ALONE
    return layout, ""


def rendering_seconds(
    config: RunConfig, dit: DiTConfig, num_tokens: int, card: Card, layout: Layout, residency: str
) -> float:
    """Returns the mean seconds of a step of the sampler; a step without guidance is one pass."""
    scales = sampler_settings(config.sample).scales
    passes = 1 + (sum(scale != 1 for scale in scales) / len(scales) if layout.guidance == 1 else 0)
    step = SamplingStep(dit, num_tokens, residency, passes, layout.context, DTYPES[config.model.dtype].itemsize)
    return sampling_seconds(step, card) + passes * sharing_seconds(layout.split, dit, num_tokens, card)


def preset_bytes(
    name: str, step: Step, dit: DiTConfig, rendering: Rendering, free: int
) -> tuple[int | None, int | None]:
    """Returns the bytes, with the reserve, of `train` and `sample` with memory=NAME; None where it does not apply."""
    train = next((flags for known, *flags in ARRANGEMENTS if known == name), None)
    if train is not None and any(train) and not can_stream(step):
        train = None
    sample, own = SAMPLING.get(name), rendering.num_tokens
    held = sampling_held(dit, own, sample or "resident", step.dtype_bytes, is_compiled=rendering.is_compiled)
    return (
        None if train is None else sum(step.held(step.policies(free, *train), *train).values()) + SPARE_BYTES,
        None if sample is None else sum(held.values()) + SPARE_BYTES,
    )


def dit_sizes(config: RunConfig) -> DiTConfig:
    """Returns the sizes of the DiT: those of the weights if they exist, else of the shipped or official model."""
    weights = WeightsFolder(weights_paths(config))
    if weights.has("dit"):
        return weights.dit_skeleton().config
    return read_official_config(assets.FOLDER / config.model.name / "dit_config.json", "dit")


def training_step(config: RunConfig, dit: DiTConfig, num_tokens: int, layout: Layout) -> Step:
    """Returns the sizes of a micro-batch of the largest clips on a GPU, with the processes of the settings."""
    with torch.device("meta"):
        shapes = linear_shapes(AsymmDiT(dit))
    size = adapter_bytes(shapes, lora_settings(config.lora, shapes), config.lora.dora)
    return step_sizes(config, dit, num_tokens, size, layout, is_gpu=True)


def count_clips(config: RunConfig) -> tuple[int, str, dict[Bucket, float], float]:
    """Returns the number of clips, their description, the share of each bucket, and the mean captions per clip.

    The number is 0 if there are no clips yet. Before `prepare` all clips are assumed to be in the largest bucket.
    """
    data, cache, status = config.data, Path(config.data.cache), "not prepared yet"
    if (cache / "data").exists():
        try:
            return count_cached(config, open_cache(cache, buckets_by_source(data), settings=prepared_settings(data)))
        except CacheVersionError:
            status = "prepared by another version of mochi-tune, and to be prepared again"
    sources, largest = read_sources(data), largest_bucket(data)
    shares = {largest: 1.0}
    where = ", ".join(str(source.folder) for source in sources)
    if any(source.folder.is_dir() and is_dataset(source.folder) for source in sources):
        return 0, f"in the dataset {where}, {status}, each {largest}", shares, 1.0
    # As `prepare` finds them.
    videos = {
        source.name: list_videos(source.folder, source.takes_stills) for source in sources if source.folder.is_dir()
    }
    count = sum(map(len, videos.values()))
    if not count:
        return 0, f"no clips in {where} yet; sizes and times assume that each has {largest}", shares, 1.0
    if any(source.clips != "head" for source in sources):
        return 0, f"of {count} videos in {where}, {status}, each {largest}", shares, 1.0
    num_captions = sum(num_captions_of(config, each, videos[each.name]) for each in sources if each.name in videos)
    num_captions /= count
    num_held = sum(len(videos.get(source.name, ())) for source in sources if source.validation)
    return count, f"{count} in {where}{_of_them(num_held)}, {status}, each {largest}", shares, num_captions


def count_cached(config: RunConfig, cache: Cache) -> tuple[int, str, dict[Bucket, float], float]:
    """Returns the same as `count_clips` for the clips of a cache."""
    # Only those of sources with validation: few others are held out, which changes the shares little.
    held = choose_held_out(config.data, cache, 0, config.seed)
    shares = bucket_shares(clip_order(config.data, cache, held, config.train.batch_size, config.seed), cache)
    largest = largest_clip(cache)
    sizes = f"each {largest}" if len(shares) == 1 else f"in {len(shares)} buckets, the largest {largest}"
    num_captions = sum(len(captions) for (captions,) in cache.rows.tuples("captions")) / len(cache)
    return len(cache), f"{len(cache)} in {cache.folder}{_of_them(len(held))}, {sizes}", shares, num_captions


def _of_them(num_held: int) -> str:
    return f", {num_held} of them for validation" if num_held else ""


def num_captions_of(config: RunConfig, source: Source, videos: list[Path]) -> int:
    """Returns the number of captions of a source's videos, counting one for each without a caption."""
    rules = CaptionRules.from_config(config.data, source, config.seed)
    texts = load_captions(source.folder, videos, rules).texts
    return sum(len(texts.get(video, ("",))) for video in videos)


def clip_bytes(bucket: Bucket, dit: DiTConfig, num_captions: float) -> float:
    """Returns the maximum bytes of a clip in the cache: mean, log variance and features of each caption, in fp32."""
    return 4 * (2 * math.prod(latent_shape(*astuple(bucket))) + num_captions * MAX_TOKENS * dit.t5_feat_dim)


def checkpoint_bytes(config: RunConfig, step: Step) -> int:
    """Returns the bytes of all kept checkpoints and of the finished adapter."""
    train = config.train
    saved = [range(every, train.steps, every) for every in (train.checkpoint_every, train.keep_every) if every]
    # Ranges are cut before they are listed: there may be any number of steps.
    newest = {train.steps}.union(*(steps[-train.keep_checkpoints :] for steps in saved))
    kept = sorted(newest)[-train.keep_checkpoints :]
    num_kept = len(kept)
    if train.keep_every:
        num_kept += train.steps // train.keep_every - sum(step % train.keep_every == 0 for step in kept)
    # One more exists while it is written.
    return step.checkpoint_bytes * (num_kept + train.keep_best + 1) + step.adapter_bytes
