"""Every setting of a run: its type, default, allowed values, meaning, and whether a resumed run may change it.

The help and docs/settings.md are made from this file. One `RunConfig` describes one LoRA for all verbs.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from mochi_tune.config.sample import SampleConfig
from mochi_tune.config.values import (
    SEED_LIMIT,
    Count,
    CountOrZero,
    FileName,
    Name,
    NotNegative,
    Number,
    Positive,
    Repo,
    Section,
    Shard,
    Share,
    SourceName,
    Text,
    Whole,
    check_folder_name,
    check_project,
    read_off,
    refuse_bool,
    setting,
)


class ModelConfig(Section):
    """The weights and their precision. The folder of the weights describes the sizes of the models."""

    RESUME = "held"

    name: Text = setting(..., "name of the base model, written into the adapter")
    weights: FileName = setting(
        ...,
        "folder of the official files, a diffusers pipeline or ComfyUI's models; or one file with all models",
        "free",
    )
    transformer: FileName | None = setting(None, "file or folder of the DiT alone; null: in model.weights", "free")
    vae: FileName | None = setting(None, "file or folder of the VAE alone; null: in model.weights", "free")
    text_encoder: FileName | None = setting(None, "file or folder of T5 alone; null: in model.weights", "free")
    tokenizer: FileName | None = setting(
        None,
        "folder of T5's tokenizer; null: next to the weights or T5, or in their ComfyUI folder",
        "free",
    )
    variant: Text | None = setting(
        None,
        "variant of diffusers and transformers files, bf16 for *.bf16.safetensors; null: the first complete one",
        "free",
    )
    dtype: Literal["bf16", "fp32"] = setting(
        "bf16", "dtype of the DiT and the VAE; fp32 takes twice the memory; adapters are always fp32"
    )
    precision: Literal["bf16", "fp8", "int8", "nf4"] | None = setting(
        None,
        "precision of the DiT's large matrices in training; fp8, int8: multiplied in 8 bits; nf4: stored in 4; null: "
        "as dtype",
        "bound",
    )


Buckets = Literal["auto"] | list[list[Whole]]
ClipMode = Literal["head", "uniform", "slide", "all"]


class SourceConfig(BaseModel):
    """One folder of data.sources, with its own settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: FileName
    # How often an epoch takes each clip, or the share of all draws relative to the weights of the other sources.
    repeats: Positive = 1.0
    weight: Positive | None = None
    # Replace data.caption_prefix, data.clips and data.buckets.
    caption_prefix: Text | None = None
    clips: ClipMode | None = None
    buckets: Buckets | None = None
    # Stands where the folder's name stands without it.
    name: SourceName | None = None
    # Its clips are held out for validation, and never trained on.
    validation: bool = False


class DataConfig(Section):
    """The clips. The cache that `prepare` wrote determines which of these settings a run may change."""

    RESUME = "free"

    videos: FileName = setting(
        "videos", "folder of NAME.mp4 with captions in NAME.txt or in a table; or a Hugging Face dataset on disk"
    )
    sources: list[SourceConfig] = setting(
        [],
        "several folders instead of data.videos: [{folder: cats, repeats: 2}, {folder: dogs}]; each may set "
        "repeats or weight, caption_prefix, clips, buckets, a name instead of the folder's, and validation: true, to "
        "hold out all its clips for the validation loss",
    )
    cache: FileName = setting(
        "cache/${name}",
        "folder that `prepare` writes and `train` reads; model=toy: cache/${name}_toy; a 37-frame 480p clip takes 4.3 "
        "MB, its caption up to 4.2 MB",
    )
    num_frames: Whole = setting(37, "frames of a clip, 6k+1, at 30 per second; memory and time grow with it")
    height: Whole = setting(480, "pixels, a multiple of 16")
    width: Whole = setting(848, "pixels, a multiple of 16")
    buckets: Buckets | None = setting(
        None,
        "sizes of clips in one run; auto: many aspect ratios and lengths, and stills; or a list of [frames, height, "
        "width]; null: only num_frames, height and width",
    )
    resolution: Count | None = setting(
        None, "for data.buckets=auto: side of a square with about as many pixels as each bucket; null: height x width"
    )
    max_frames: Whole | None = setting(None, "for data.buckets=auto: maximum number of frames, 6k+1; null: num_frames")
    bucket_shares: list[Positive] | None = setting(
        None, "share of the draws for each entry of data.buckets; null: in proportion to its number of clips"
    )
    clips: ClipMode = setting(
        "head",
        "which clips are cut from a video; head: the first; uniform: max_clips spread evenly; slide: one every "
        "clip_stride frames; all: one after the other",
    )
    clip_stride: Count | None = setting(None, "for clips=slide: frames from one clip to the next; null: half of a clip")
    max_clips: Count | None = setting(None, "maximum number of clips per video; null: no limit")
    preview: FileName | None = setting(
        None, "folder for the cut clips as lossless .mkv, frame for frame as the VAE gets them; null: none"
    )
    allow_empty_captions: bool = setting(False, "true: clips without a caption are trained with the empty prompt")
    captions: Literal["one", "lines"] = setting(
        "one", "content of a .txt file: one caption, or several captions of the clip, one per line"
    )
    caption_prefix: Text = setting("", "text before each caption that is not empty, such as a trigger word")
    caption_suffix: Text = setting("", "text after each caption that is not empty")
    tag_dropout: Share = setting(
        0.0, "share of the comma-separated tags of a caption, except the first, that is dropped at random"
    )
    caption_variants: Count = setting(1, "number of random tag selections per caption; needs data.tag_dropout above 0")
    allow_upscale: bool = setting(False, "true: enlarges clips smaller than the target; the LoRA learns their blur")
    frame_rate: Literal["resample", "retime", "auto"] = setting(
        "resample",
        "resample: keeps the speed, repeats or drops frames for 30 fps; retime: plays each frame once, so that 24 fps "
        "run 1.25 times as fast; auto: retimes 23 to 33 fps",
    )
    hdr: Literal["refuse", "tonemap"] = setting("refuse", "PQ and HLG clips: refuse them, or tonemap them to BT.709")
    decoder: Literal["auto", "pyav", "decord"] = setting(
        "auto",
        "decoding library; auto: PyAV; decord decodes plain files equally, but reads each file into memory",
    )
    decode_timeout_seconds: Positive = setting(120.0, "seconds until a clip that is still decoding is refused")
    damaged: Literal["strict", "quarantine"] = setting(
        "strict", "damaged clips in the cache: strict stops the run, quarantine trains on the other clips"
    )


class LoraConfig(Section):
    """The adapter: its layers, selected by regular expressions on their official names, and their size and kind."""

    RESUME = "held"

    targets: list[Text] = setting([], "regular expressions on complete layer names; lora=NAME sets them")
    rank: Count = setting(16, "rank; at 16 the adapter takes 104 MB (attention) or 244 MB (attention_mlp), in fp32")
    alpha: Positive = setting(16.0, "the adapter is scaled by alpha / rank")
    dropout: Share = setting(0.0, "share of the adapter's inputs that training drops")
    rank_pattern: dict[str, Count] = setting({}, "rank of the layers whose complete name matches the pattern")
    alpha_pattern: dict[str, Positive] = setting({}, "alpha by pattern")
    dropout_pattern: dict[str, Share] = setting({}, "dropout by pattern")
    rslora: bool = setting(False, "true: scales by alpha / sqrt(rank), so that a high rank is not scaled down too far")
    dora: bool = setting(
        False, "true: also trains the length of each row (DoRA); slower, loads only in mochi-tune and diffusers"
    )
    init_from: FileName | None = setting(
        None, "adapter to start from, named as in sample.adapter, with the same layers and no higher rank"
    )


class TrainConfig(Section):
    """The training loop."""

    steps: Count = setting(1000, "optimizer steps; a new style first shows after 200 to 400", "free")
    # A run may change these two. Their product with the data-parallel processes is bound, as global_batch.
    batch_size: Count = setting(1, "clips per batch and process; memory grows with it", "free")
    accumulation_steps: Count = setting(1, "batches per optimizer step; time grows with it, memory does not", "free")
    objective: Literal["sampler", "official", "unnormalised"] = setting(
        "sampler",
        "sampler: the latent space of rendering; official: reproduces the reference trainer; unnormalised: for "
        "comparison",
    )
    sigma_distribution: Literal["uniform", "logit_normal", "shifted"] = setting(
        "uniform", "distribution of noise levels; logit_normal draws more of the middle, shifted more of the noisy ones"
    )
    sigma_mean: Number = setting(0.0, "for logit_normal; above 0 draws more of the noisy levels")
    sigma_std: Positive = setting(1.0, "for logit_normal; a smaller value draws more of the middle")
    sigma_shift: Positive = setting(1.0, "for shifted; 3 puts half of the levels above 0.75, 1 is uniform")
    sigma_stratified: bool = setting(
        False, "true: the samples of a step spread over all noise levels; needs several samples per step"
    )
    loss_weighting: Literal["none", "bell", "cosmap"] = setting(
        "none", "weight by noise level; bell is zero at the ends, cosmap half as much at the ends"
    )
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "prodigy", "muon", "schedule_free"] = setting(
        "adamw",
        "adamw_8bit takes a quarter of the memory of adamw, adafactor almost none; prodigy finds the rate itself, with "
        "learning_rate=1; schedule_free needs schedule=constant",
        "held",
    )
    learning_rate: Positive = setting(2e-4, "peak; after the warm-up it follows the schedule")
    learning_rate_b_ratio: Positive = setting(
        1.0, "learning rate of the B matrices relative to the A matrices (LoRA+); 4 to 16 with a smaller learning rate"
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = setting(
        "cosine", "cosine and linear fall to almost 0 at the last step; wsd stays constant, then falls linearly"
    )
    warmup_steps: CountOrZero = setting(50, "steps from 0 to the peak learning rate")
    decay_share: Annotated[Number, Field(gt=0, le=1)] = setting(0.2, "for wsd: share of the steps with a falling rate")
    weight_decay: NotNegative = setting(0.01, "share by which a step shrinks the adapter, times the learning rate")
    max_grad_norm: NotNegative = setting(1.0, "gradients of a larger norm are scaled down to it; 0: none are")
    caption_dropout: Share = setting(0.1, "share of the samples trained with the empty prompt; guidance needs it")
    recompute: Literal["auto", "none", "attention", "block"] = setting(
        "auto",
        "what the backward pass recomputes to save memory; none: nothing; attention: all but the attention; block: "
        "all of each block; auto: the least that the free memory of the GPU allows, block by block, and all of each "
        "if it runs out",
        "free",
    )
    deterministic: bool = setting(
        False,
        "true: uses only kernels that torch documents as deterministic, so that two runs of one command are equal bit "
        "for bit on a GPU, too; slower",
        "free",
    )
    compile: bool | None = setting(
        None, "true: compiles the blocks: a slow first step, then faster ones; null: on a GPU", "free"
    )
    checkpoint_every: CountOrZero = setting(200, "steps between checkpoints; 0: only after the last step", "free")
    keep_checkpoints: Count = setting(3, "number of newest checkpoints to keep", "free")
    keep_every: CountOrZero = setting(0, "steps; also saves and keeps the multiples of this; 0: none", "free")
    keep_best: bool = setting(False, "true: also saves and keeps the step of the lowest validation loss", "free")
    ema_decay: Share = setting(
        0.0, "0.999: validates, renders and publishes a moving average of the adapter (EMA); 0: none"
    )
    spike_policy: Annotated[Literal["off", "warn", "skip", "stop"], BeforeValidator(read_off)] = setting(
        "warn", "reaction to a loss far above the recent ones; skip leaves out the update, stop ends the run"
    )
    spike_factor: Annotated[float, BeforeValidator(refuse_bool), Field(gt=1)] = setting(
        10.0, "a loss above this multiple of the median of the last 50 is a spike"
    )
    validate_every: CountOrZero = setting(
        200,
        "steps between validations; 0: never, and no clip is held out but those of a source with validation",
        "free",
    )
    validation_clips: CountOrZero = setting(
        4,
        "clips held out for the validation loss, at most a fifth of all; or how many are measured of those in sources "
        "with validation; costs 4 forward passes each; a change of the held-out clips changes the order of the others",
        "free",
    )
    sample_every: CountOrZero = setting(
        200, "steps between eval videos, which take a `sample` per prompt; 0: never", "free"
    )
    sample_prompts: list[Name] = setting(
        [], """prompts of the eval videos; in a shell in single quotes, 'train.sample_prompts=["a cat"]'""", "free"
    )


class ParallelConfig(Section):
    """The number of processes, and how they share rendering, training or encoding."""

    RESUME = "free"

    num_processes: Count = setting(
        1, "processes of `prepare`, `train` and `sample` on this machine, one per GPU; with Ray, its workers"
    )
    engine: Literal["processes", "ray"] = setting(
        "processes", "for `prepare` and `sample`: what starts the workers; ray: pip install 'mochi-tune[ray]'"
    )
    ray_address: FileName | None = setting(
        None,
        "for parallel.engine=ray: the cluster, auto, HOST:PORT or ray://HOST:PORT; null: starts one here",
    )
    shard: Shard | None = setting(
        None,
        "3/16: `prepare` encodes the third of 16 shares without making the cache, `sample` renders the third of 16 "
        "shares of the videos; merge: `prepare` makes the cache of all shares; null: all in one run",
    )
    strategy: Literal["data", "zero2", "zero3"] = setting(
        "data",
        "for `train`; data: every process has the model; zero2: DeepSpeed shards the optimizer; zero3: also the model",
    )
    data: Count | None = setting(None, "groups of processes that render different videos; null: the cheapest layout")
    guidance: Count | None = setting(
        None, "2: prompt and negative prompt on different processes; null: the cheapest layout"
    )
    context: Count | None = setting(
        None, "processes that share the tokens of a video; null: the cheapest layout, in training 1"
    )
    check_inputs: bool = setting(
        False, "for debugging; true: processes that share a video compare their inputs of the DiT at every pass"
    )
    timeout_seconds: Positive = setting(600.0, "seconds that a process waits for another before all processes end")


class MemoryConfig(Section):
    """Where the DiT's weights are and their precision during sampling; what `train` keeps in host memory."""

    RESUME = "free"

    dit: Literal["auto", "resident", "int8", "fp8", "offload", "stream", "shard"] = setting(
        "resident",
        "resident: on the GPU; int8, fp8: on the GPU in 8 bits, in `train` as resident; offload, stream: in host "
        "memory, a few blocks at a time on the GPU; shard: split over the GPUs of a video; auto: the fastest of "
        "resident and stream that fits, in `train` with activations in host memory if necessary",
    )
    activations: Literal["keep", "offload"] = setting(
        "keep", "for `train`; offload: keeps the inputs of each block in host memory until the backward pass"
    )
    t5_dtype: Literal["fp32", "bf16", "int8"] = setting(
        "fp32",
        "of T5 in `prepare`; fp32 takes 18 GiB of the GPU, bf16 9, int8 5; the last two round the features; `sample` "
        "and eval prompts use model.dtype, or int8 where this is int8",
    )
    tiles: list[Whole] | None = setting(
        None, "[rows, columns]: decodes in tiles, with less memory and faint seams; null: exact"
    )


class LogConfig(Section):
    """Trackers for metrics, in addition to the console and metrics.jsonl."""

    RESUME = "free"

    wandb: Literal["disabled", "offline", "online"] = setting("disabled", "Weights & Biases")
    tensorboard: bool = setting(False, "true: writes event files to run_dir/trackers/tensorboard")
    trackio: bool = setting(False, "true: logs to trackio on this machine; pip install 'mochi-tune[trackio]'")
    project: Annotated[Name, AfterValidator(check_project)] = setting(
        "mochi-tune", "name of the project in W&B and trackio"
    )


class PublishConfig(Section):
    """The metadata of the adapter, and where `train` uploads it at the end."""

    RESUME = "free"

    push: Repo | None = setting(
        None,
        "owner/name on the Hugging Face hub: `train` uploads the finished adapter with a model card; null: nowhere",
    )
    private: bool = setting(True, "true: a repository that push creates is private; an existing one is not changed")
    title: Text | None = setting(None, "title of the adapter; null: the run's name")
    author: Text | None = setting(None, "name or address of the author; null: not stated")
    license: Text | None = setting(None, "license identifier of the hub, such as apache-2.0; null: not stated")
    trigger: Text | None = setting(
        None, "trigger words of the adapter; null: data.caption_prefix without trailing punctuation"
    )


class RunConfig(Section):
    """The settings outside the sections."""

    name: Annotated[Name, AfterValidator(check_folder_name)] = setting(
        "my_lora", "names the run folder, the cache and the adapter", "free"
    )
    run_dir: FileName = setting(
        "runs/${name}",
        "folder of checkpoints, adapter, metrics and samples; model=toy: runs/${name}_toy",
        "free",
    )
    seed: Annotated[Whole, Field(ge=0, lt=SEED_LIMIT)] = setting(0, "seed of all random numbers: adapter, noise, order")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: a GPU if there is one", "free")
    resume: Literal["auto", "force"] = setting(
        "auto", "auto: the same command resumes the run; force: also with other settings, data or another torch", "free"
    )
    resume_from: FileName | None = setting(
        None, "checkpoint folder to resume from; later ones are moved aside; null: the newest complete one", "free"
    )
    model: ModelConfig
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig()
    sample: SampleConfig = SampleConfig()
    log: LogConfig = LogConfig()
    publish: PublishConfig = PublishConfig()
