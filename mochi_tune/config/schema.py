"""Every setting of a run, typed, with its default: one object describes one LoRA for all verbs."""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any


@dataclass
class ModelConfig:
    """Which weights, and in which precision. The folder describes the sizes of the models in it."""

    name: str = "???"
    weights: str = "???"
    dtype: str = "bf16"


@dataclass
class DataConfig:
    """The clips: where they lie, and what is cut out of them."""

    videos: str = "videos"
    cache: str = "cache"
    num_frames: int = 37
    height: int = 480
    width: int = 848
    allow_empty_captions: bool = False
    allow_upscale: bool = False
    decode_timeout_seconds: float = 120.0
    damaged: str = "strict"


@dataclass
class LoraConfig:
    """The adapter: which layers by regular expression on their official names, how large, of which kind, from where."""

    targets: list[str] = field(default_factory=list)
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    dropout_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    init_from: str | None = None


@dataclass
class TrainConfig:
    """The training loop."""

    steps: int = 1000
    batch_size: int = 1
    accumulation_steps: int = 1
    objective: str = "sampler"
    sigma_distribution: str = "uniform"
    sigma_mean: float = 0.0
    sigma_std: float = 1.0
    sigma_shift: float = 1.0
    sigma_stratified: bool = False
    loss_weighting: str = "none"
    optimizer: str = "adamw"
    learning_rate: float = 2e-4
    learning_rate_b_ratio: float = 1.0
    schedule: str = "cosine"
    warmup_steps: int = 50
    decay_share: float = 0.2
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    caption_dropout: float = 0.1
    gradient_checkpointing: bool = True
    checkpoint_every: int = 200
    keep_checkpoints: int = 3
    keep_every: int = 0
    keep_best: bool = False
    ema_decay: float = 0.0
    spike_policy: str = "warn"
    spike_factor: float = 10.0
    validate_every: int = 200
    validation_clips: int = 4
    sample_every: int = 200
    sample_prompts: list[str] = field(default_factory=list)


@dataclass
class SampleConfig:
    """The sampler, for `sample` and for the videos rendered while training."""

    prompt: str = ""
    prompts: str | None = None
    negative_prompt: str = ""
    seeds: list[int] | None = None
    compare: str | None = None
    adapter: Any = None
    adapter_strength: Any = 1.0
    out: str | None = None
    prompt_cache: str = "~/.cache/mochi_tune/prompts"
    save_latents: bool = False
    compile: bool = False
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    preset: str = "quality"
    steps: int | None = None
    guidance: Any = None
    sigmas: list[float] | None = None
    threshold: float | None = None
    linear_steps: int | None = None


@dataclass
class LogConfig:
    """Where metrics go besides the console and metrics.jsonl."""

    wandb: str = "disabled"
    tensorboard: bool = False
    trackio: bool = False
    project: str = "mochi-tune"


@dataclass
class ParallelConfig:
    """How many processes work together, and how they share a rendering or a training."""

    num_processes: int = 1
    strategy: str = "data"
    data: int | None = None
    guidance: int | None = None
    context: int | None = None
    timeout_seconds: float = 600.0


@dataclass
class MemoryConfig:
    """Where the DiT's weights are while it samples, and how precise; into how many tiles a decoded video is cut."""

    dit: str = "resident"
    tiles: list[int] | None = None


@dataclass
class RunConfig:
    """Everything that one LoRA is made of."""

    name: str = "my_lora"
    run_dir: str = "runs/${name}"
    seed: int = 0
    device: str = "auto"
    resume: str = "auto"
    resume_from: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    log: LogConfig = field(default_factory=LogConfig)


def known_keys() -> dict[str, type]:
    """Returns every dotted key of the settings with its declared type."""
    keys: dict[str, type] = {}

    def walk(cls: type, prefix: str) -> None:
        for entry in fields(cls):
            if is_dataclass(entry.type):
                walk(entry.type, f"{prefix}{entry.name}.")
            else:
                keys[prefix + entry.name] = entry.type

    walk(RunConfig, "")
    return keys


def setting(config: RunConfig, key: str) -> Any:
    """Returns the value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Returns every setting by its dotted key."""
    return {key: setting(config, key) for key in known_keys()}


def sample_size(config: RunConfig) -> tuple[int, int, int]:
    """Returns the number of frames, the height and the width to render: the sample's own, else the data's."""
    return tuple(
        data if sample is None else sample
        for sample, data in (
            (config.sample.num_frames, config.data.num_frames),
            (config.sample.height, config.data.height),
            (config.sample.width, config.data.width),
        )
    )
