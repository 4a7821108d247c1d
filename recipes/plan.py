"""Says what a run will take before anything is loaded: memory by stage, time, disk, and which settings fit the GPU."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mochi_tune import assets
from mochi_tune.adapters.lora import linear_shapes
from mochi_tune.config.load import weights_folder
from mochi_tune.config.lora import lora_settings
from mochi_tune.config.schema import RunConfig, sample_size
from mochi_tune.data.cache import open_cache
from mochi_tune.data_prep.clips import find_videos
from mochi_tune.errors import ConfigError
from mochi_tune.models.device import DTYPES
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.latents import TOKEN_PIXELS, check_geometry, latent_shape, num_latent_frames
from mochi_tune.models.text_encoder import MAX_TOKENS
from mochi_tune.parallel.forecast import (
    CARDS,
    GIB,
    SPARE_BYTES,
    Card,
    Step,
    decoding_held,
    decoding_seconds,
    encoding_held,
    encoding_seconds,
    sampling_held,
    sampling_seconds,
    text_held,
)
from mochi_tune.parallel.mesh import training_layout
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.training.memory_plan import ARRANGEMENTS, arrange
from mochi_tune.weights.configs import read_official_config
from mochi_tune.weights.folder import WeightsFolder

# What `sample` may be set to, the fastest first.
SAMPLING = (("80gb", "resident"), ("24gb", "fp8"), ("16gb", "offload"))


@dataclass(frozen=True)
class Stage:
    """What a part of a run holds on the GPU, in bytes by what they are for, and its seconds, if the card is known."""

    name: str
    held: dict[str, int]
    seconds: float | None
    per: str

    @property
    def total(self) -> int:
        """All that is held, and what is to be spare."""
        return sum(self.held.values()) + SPARE_BYTES


@dataclass(frozen=True)
class RunForecast:
    """What a run will take.

    Attributes:
        clips: what there is to train on, in words.
        num_tokens: visual tokens of a clip.
        card: the GPU, in words.
        gib: its memory.
        stages: of prepare, train and sample.
        run_seconds: of all steps of the training; None where the card's speed is not known.
        presets: for each value of memory=, the bytes that `train` and `sample` hold with it; None where it is not for
            one of them.
        advice: the settings to use.
        cache_bytes, checkpoint_bytes: on disk; the cache's is 0 while the number of clips is not known.
    """

    clips: str
    num_tokens: int
    card: str
    gib: float
    stages: list[Stage]
    run_seconds: float | None
    presets: dict[str, tuple[int | None, int | None]]
    advice: str
    cache_bytes: int
    checkpoint_bytes: int


def main(config: RunConfig, card: str = "", card_gib: int = 0) -> RunForecast:
    """Foretells a run on the GPU that is here, or on another one.

    Args:
        config: of the run.
        card: one of `forecast.CARDS`, or another name with `card_gib`; "" is the GPU that is here.
        card_gib: memory of a card that is not in the table, in GiB.

    Raises:
        ConfigError: there is no GPU and no card is named, or one that is not known without its memory.
    """
    check_geometry(config.data.num_frames, config.data.height, config.data.width)
    sampler_settings(config.sample)
    words, gib, speed = find_card(card, card_gib)
    dit, data = dit_sizes(config), config.data
    step = training_step(config, dit)
    free, dtype_bytes = int(gib * GIB), DTYPES[config.model.dtype].itemsize
    try:
        plan = arrange(step, config.memory.dit, config.memory.activations, free)
        policies, arrangement = plan.recompute, (plan.is_streamed, plan.offloads_inputs)
        advice = "it fits as it is set"
    except ConfigError as error:
        arrangement = (config.memory.dit in ("stream", "offload"), config.memory.activations == "offload")
        policies, advice = step.policies(free, *arrangement), str(error).removesuffix(".")
    video = sample_size(config.sample, data)
    clip_size = (data.num_frames, data.height, data.width)
    residency = {"auto": "resident"}.get(config.memory.dit, config.memory.dit)
    micro_batches = config.train.accumulation_steps
    rows, columns = config.memory.tiles or (1, 1)

    def timed(seconds: float, per: str) -> tuple[float | None, str]:
        return (seconds if speed else None), per

    known = speed or CARDS["h200"]
    train_seconds = micro_batches * step.seconds(policies, known, arrangement[0])
    tokens = num_latent_frames(video[0]) * video[1] * video[2] // TOKEN_PIXELS**2
    stages = [
        Stage("prepare: captions", text_held(DTYPES[config.memory.t5_dtype].itemsize), None, ""),
        Stage(
            "prepare: clips",
            encoding_held(*clip_size, dtype_bytes),
            *timed(encoding_seconds(*clip_size, known), "a clip"),
        ),
        Stage("train", step.held(policies, *arrangement), *timed(train_seconds, "a step")),
        Stage("sample: prompts", text_held(dtype_bytes), None, ""),
        Stage(
            "sample: denoise",
            sampling_held(dit, tokens, residency, dtype_bytes),
            *timed(sampling_seconds(dit, tokens, known), "a step"),
        ),
        Stage(
            "sample: decode",
            decoding_held(*video[1:], rows * columns, dtype_bytes),
            *timed(decoding_seconds(*video, known), "a video"),
        ),
    ]
    presets: dict[str, tuple[int | None, int | None]] = {}
    for name in ("80gb", "24gb", "16gb", "12gb"):
        train = next((flags for known_name, *flags in ARRANGEMENTS if known_name == name), None)
        sample = dict(SAMPLING).get(name)
        presets[name] = (
            None if train is None else sum(step.held(step.policies(free, *train), *train).values()) + SPARE_BYTES,
            None if sample is None else sum(sampling_held(dit, tokens, sample, dtype_bytes).values()) + SPARE_BYTES,
        )
    count, clips = count_clips(config)
    return RunForecast(
        clips,
        step.num_tokens // config.train.batch_size,
        words,
        gib,
        stages,
        train_seconds * config.train.steps if speed else None,
        presets,
        advice,
        count * clip_bytes(config, dit),
        checkpoint_bytes(config, step.adapter_bytes),
    )


def find_card(name: str, gib: int) -> tuple[str, float, Card | None]:
    """Returns a card's name in words, its memory in GiB and its speeds, if they are known.

    Raises:
        ConfigError: as `main`.
    """
    if not name:
        if not torch.cuda.is_available():
            raise ConfigError(f"there is no GPU here: name one, as card=4090; known are {', '.join(CARDS)}.")
        properties = torch.cuda.get_device_properties(0)
        words = properties.name.lower().replace(" ", "")
        # The longest name that stands in what the driver calls it.
        fitting = [key for key in CARDS if key.partition("-")[0] in words]
        speed = CARDS[max(fitting, key=len)] if fitting else None
        return properties.name, torch.cuda.mem_get_info(0)[0] / GIB, speed
    known = CARDS.get(name.lower())
    if known is None and not gib:
        raise ConfigError(
            f"card={name} is not known: use one of {', '.join(CARDS)}, or give its memory too, as card_gib=24."
        )
    return f"{name} (not here: foretold)", float(gib or (known.gib if known else 0)), known


def dit_sizes(config: RunConfig) -> DiTConfig:
    """Returns the sizes of the DiT: of the weights where they are, else of the model that is shipped or official."""
    weights = WeightsFolder(weights_folder(config))
    if weights.has("dit"):
        return weights.dit_skeleton().config
    return read_official_config(Path(assets.__path__[0]) / config.model.name / "dit_config.json", "dit")


def training_step(config: RunConfig, dit: DiTConfig) -> Step:
    """Returns the sizes of a micro-batch on one of the processes that the settings name."""
    train, data, num_processes = config.train, config.data, config.parallel.num_processes
    with torch.device("meta"):
        shapes = linear_shapes(AsymmDiT(dit))
    layers = lora_settings(config.lora, shapes)
    layout = training_layout(num_processes, dit.num_heads, config.parallel.context or 1)
    tokens = num_latent_frames(data.num_frames) * data.height * data.width // TOKEN_PIXELS**2
    is_zero3 = config.parallel.strategy == "zero3"
    return Step(
        dit,
        tokens * train.batch_size // layout.context,
        4 * sum(layer.rank * sum(shapes[name]) for name, layer in layers.items()),
        dtype_bytes=DTYPES[config.model.dtype].itemsize,
        precision=config.model.precision or "bf16",
        recompute=train.recompute,
        is_compiled=train.compile is not False and not is_zero3,
        holds_modulation=is_zero3,
        num_shards=num_processes if is_zero3 else 1,
    )


def count_clips(config: RunConfig) -> tuple[int, str]:
    """Returns the number of clips, 0 where there are none yet, and what is known of them in words."""
    data, cache = config.data, Path(config.data.cache)
    size = f"{data.num_frames} frames of {data.height}x{data.width}"
    if (cache / "data").exists():
        found = open_cache(cache, num_frames=data.num_frames, height=data.height, width=data.width)
        return len(found), f"{len(found)} in {cache}, each {size}"
    if Path(data.videos).is_dir():
        count = len(find_videos(Path(data.videos)))
        return count, f"{count} videos in {data.videos}, not prepared yet, each {size}"
    return 0, f"none yet in {data.videos}, each {size}"


def clip_bytes(config: RunConfig, dit: DiTConfig) -> int:
    """Returns the bytes that a clip takes in the cache at most: mean, log variance and a caption's features, fp32."""
    data = config.data
    channels, *shape = latent_shape(data.num_frames, data.height, data.width)
    numbers = 2 * channels * shape[0] * shape[1] * shape[2]
    return 4 * (numbers + MAX_TOKENS * dit.t5_feat_dim)


def checkpoint_bytes(config: RunConfig, adapter_bytes: int) -> int:
    """Returns the bytes of all checkpoints that are kept: the adapter, AdamW's two moments, and the average."""
    train = config.train
    each = adapter_bytes * (3 + bool(train.ema_decay))
    kept = train.keep_checkpoints + (train.steps // train.keep_every if train.keep_every else 0)
    # One more is there while it is written.
    return each * (kept + 1) + adapter_bytes
