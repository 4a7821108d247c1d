"""Every setting of a run, said once: its type, default, allowed values, meaning, and whether a run may change it.

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
    FileText,
    Name,
    NotNegative,
    Number,
    Positive,
    Repo,
    Section,
    Shard,
    Share,
    Text,
    Whole,
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
        "folder: the official files, a diffusers pipeline, or ComfyUI's models; or a file that holds all in one",
        "free",
    )
    transformer: FileText | None = setting(None, "file or folder of the DiT alone; null: in model.weights", "free")
    vae: FileText | None = setting(None, "file or folder of the VAE alone; null: in model.weights", "free")
    text_encoder: FileText | None = setting(None, "file or folder of T5 alone; null: in model.weights", "free")
    tokenizer: FileText | None = setting(
        None, "folder of T5's tokenizer; null: beside the weights or T5, or in the ComfyUI that holds them", "free"
    )
    variant: Text | None = setting(
        None,
        "of diffusers' and transformers' files, bf16 for *.bf16.safetensors; null: the first complete",
        "free",
    )
    dtype: Literal["bf16", "fp32"] = setting(
        "bf16", "of the DiT and the VAE; fp32 takes twice the memory; adapters are fp32 with both"
    )
    precision: Literal["bf16", "fp8", "int8", "nf4"] | None = setting(
        None,
        "of the DiT's large matrices while it trains; fp8, int8: multiplied in 8 bits; nf4: held in 4; null: as dtype",
        "bound",
    )


Buckets = Literal["auto"] | list[list[Whole]]
ClipMode = Literal["head", "uniform", "slide", "all"]


class SourceConfig(BaseModel):
    """One folder of data.sources, with settings of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: FileName
    # An epoch takes each clip so often, or this share of all draws relative to the other sources' weights.
    repeats: Positive = 1.0
    weight: Positive | None = None
    # In the place of data.caption_prefix, data.clips and data.buckets.
    caption_prefix: Text | None = None
    clips: ClipMode | None = None
    buckets: Buckets | None = None


class DataConfig(Section):
    """The clips. The cache that `prepare` wrote decides which of these settings a run may change."""

    RESUME = "free"

    videos: FileName = setting(
        "videos", "folder: NAME.mp4 with NAME.txt beside it, or with a table; or a dataset of Hugging Face on disk"
    )
    sources: list[SourceConfig] = setting(
        [],
        "several folders in the place of data.videos: [{folder: cats, repeats: 2}, {folder: dogs}]; each may set "
        "repeats or weight, caption_prefix, clips, buckets",
    )
    cache: FileName = setting(
        "cache/${name}",
        "folder that `prepare` writes and `train` reads, with model=toy cache/${name}_toy; a 37-frame 480p clip takes "
        "4.3 MB, its caption up to 4.2 MB",
    )
    num_frames: Whole = setting(37, "frames of a clip, 6k+1, at 30 per second; memory and time grow with it")
    height: Whole = setting(480, "pixels, a multiple of 16")
    width: Whole = setting(848, "pixels, a multiple of 16")
    buckets: Buckets | None = setting(
        None,
        "sizes of clips in one run; auto: many aspect ratios and lengths, and stills; or a list of [frames, height, "
        "width]; null: num_frames, height and width alone",
    )
    resolution: Count | None = setting(
        None, "of data.buckets=auto: each has about as many pixels as a square of this side; null: height x width"
    )
    max_frames: Whole | None = setting(None, "of data.buckets=auto: frames of the longest, 6k+1; null: num_frames")
    bucket_shares: list[Positive] | None = setting(
        None, "share of the draws that each of a list of data.buckets gets; null: as many as it has clips"
    )
    clips: ClipMode = setting(
        "head",
        "which clips are cut from a video; head: the first; uniform: max_clips spread evenly; slide: one every "
        "clip_stride frames; all: one after the other",
    )
    clip_stride: Count | None = setting(None, "frames from one clip to the next of slide; null: half of a clip")
    max_clips: Count | None = setting(None, "clips of one video at most; null: as many as it holds")
    preview: FileText | None = setting(
        None, "folder for what `prepare` cuts, frame for frame as the VAE gets it, as lossless .mkv; null: none"
    )
    allow_empty_captions: bool = setting(False, "true: a clip without a caption is trained with the empty prompt")
    captions: Literal["one", "lines"] = setting(
        "one", "what a .txt file beside a clip holds: one caption, or lines that are each a caption of the clip"
    )
    caption_prefix: Text = setting("", "text before each caption that is not empty, such as a trigger word")
    caption_suffix: Text = setting("", "text after each caption that is not empty")
    tag_dropout: Share = setting(
        0.0, "share of the comma-separated tags of a caption, all but the first one, that is left out at random"
    )
    caption_variants: Count = setting(1, "times that tags are drawn for each caption; needs data.tag_dropout above 0")
    allow_upscale: bool = setting(False, "true: clips smaller than the target are enlarged; the LoRA learns their blur")
    frame_rate: Literal["resample", "retime", "auto"] = setting(
        "resample",
        "resample: keeps the speed, repeats or drops frames to make 30 a second; retime: plays each frame once, 24 per "
        "second 1.25 times as fast; auto: retimes 23 to 33 a second",
    )
    hdr: Literal["refuse", "tonemap"] = setting("refuse", "of PQ and HLG clips; tonemap: converts them to BT.709")
    decoder: Literal["auto", "pyav", "decord"] = setting(
        "auto",
        "library that decodes; auto: PyAV; decord reads plain files alike, a long one whole into memory",
    )
    decode_timeout_seconds: Positive = setting(120.0, "seconds; a clip that takes longer to decode is refused")
    damaged: Literal["strict", "quarantine"] = setting(
        "strict", "what a damaged clip in the cache does: strict stops the run, quarantine trains on the other clips"
    )


class LoraConfig(Section):
    """The adapter: its layers, by regular expression on their official names, and the size and kind of each."""

    RESUME = "held"

    targets: list[Text] = setting([], "regular expressions on complete layer names; lora=NAME sets them")
    rank: Count = setting(16, "rank; at 16 the adapter takes 104 MB (attention) or 244 MB (attention_mlp), in fp32")
    alpha: Positive = setting(16.0, "the adapter is scaled by alpha / rank")
    dropout: Share = setting(0.0, "share of the adapter's inputs that training drops")
    rank_pattern: dict[str, Count] = setting({}, "another rank for the layers whose complete name matches the pattern")
    alpha_pattern: dict[str, Positive] = setting({}, "another alpha, by pattern")
    dropout_pattern: dict[str, Share] = setting({}, "another dropout, by pattern")
    rslora: bool = setting(False, "true: scaled by alpha / sqrt(rank), so that a high rank is not scaled away")
    dora: bool = setting(
        False, "true: trains the length of each row too (DoRA); slower, and for mochi-tune and diffusers only"
    )
    init_from: FileName | None = setting(
        None, "adapter to start from, as sample.adapter names one, of the same layers and of no higher rank"
    )


class TrainConfig(Section):
    """The training loop."""

    steps: Count = setting(1000, "optimizer steps; a new style first shows after 200 to 400", "free")
    # A run may change these two: their product with the data-parallel processes is bound, as global_batch.
    batch_size: Count = setting(1, "clips per batch and process; memory grows with it", "free")
    accumulation_steps: Count = setting(1, "batches per optimizer step; time grows with it, memory does not", "free")
    objective: Literal["sampler", "official", "unnormalised"] = setting(
        "sampler",
        "sampler: the latent space that is rendered in; official: reproduces the reference trainer; "
        "unnormalised: for comparison",
    )
    sigma_distribution: Literal["uniform", "logit_normal", "shifted"] = setting(
        "uniform", "of the noise levels; logit_normal draws more of the middle, shifted more of the noisy ones"
    )
    sigma_mean: Number = setting(0.0, "of logit_normal; above 0 draws more of the noisy levels")
    sigma_std: Positive = setting(1.0, "of logit_normal; a smaller one draws more of the middle")
    sigma_shift: Positive = setting(1.0, "of shifted; 3 puts half of the levels above 0.75, 1 is uniform")
    sigma_stratified: bool = setting(
        False, "true: the samples of a step spread over all noise levels; needs several samples per step"
    )
    loss_weighting: Literal["none", "bell", "cosmap"] = setting(
        "none", "by noise level; bell is zero at the ends, cosmap half as much at the ends"
    )
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "prodigy", "muon", "schedule_free"] = setting(
        "adamw",
        "adamw_8bit takes a quarter of its memory, adafactor next to none; prodigy finds the rate itself, with "
        "learning_rate=1; schedule_free goes with schedule=constant",
        "held",
    )
    learning_rate: Positive = setting(2e-4, "peak; after the warm-up it follows the schedule")
    learning_rate_b_ratio: Positive = setting(
        1.0, "rate of the B matrices over that of A (LoRA+); 4 to 16 with a smaller learning rate"
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = setting(
        "cosine", "cosine and linear fall to 0 at the last step; wsd stays constant, then falls linearly to 0"
    )
    warmup_steps: CountOrZero = setting(50, "steps from 0 to the peak")
    decay_share: Annotated[Number, Field(gt=0, le=1)] = setting(0.2, "share of the steps in which wsd falls")
    weight_decay: NotNegative = setting(0.01, "share by which a step shrinks the adapter, times the learning rate")
    max_grad_norm: Positive = setting(1.0, "gradients of a larger norm are scaled down to it")
    caption_dropout: Share = setting(0.1, "share of the samples trained with the empty prompt, which guidance needs")
    recompute: Literal["auto", "none", "attention", "block"] = setting(
        "auto",
        "what a step computes again instead of keeping it; none: nothing; attention: all but the attention; "
        "block: all of each block; auto: the least that the free memory of the GPU allows, block by block, and all of "
        "each if it runs out in a step",
        "free",
    )
    deterministic: bool = setting(
        False,
        "true: runs only kernels whose sums have the same order each time by torch's word, for two runs of one command "
        "that are equal bit for bit on a GPU, too; slower",
        "free",
    )
    compile: bool | None = setting(
        None, "true: compiles the blocks, which makes steps faster after the first; null: on a GPU", "free"
    )
    checkpoint_every: CountOrZero = setting(200, "steps; 0: only after the last one", "free")
    keep_checkpoints: Count = setting(3, "newest checkpoints to keep", "free")
    keep_every: CountOrZero = setting(0, "steps; its multiples are saved and kept too; 0: none", "free")
    keep_best: bool = setting(False, "true: saves and keeps the step of the lowest validation loss too", "free")
    ema_decay: Share = setting(
        0.0, "0.999: validates, renders and publishes a moving average of the adapter (EMA); 0: none"
    )
    spike_policy: Annotated[Literal["off", "warn", "skip", "stop"], BeforeValidator(read_off)] = setting(
        "warn", "what a loss far above the recent ones does; skip leaves out the update, stop ends the run"
    )
    spike_factor: Annotated[float, BeforeValidator(refuse_bool), Field(gt=1)] = setting(
        10.0, "times the median of the last 50 losses is a spike"
    )
    validate_every: CountOrZero = setting(200, "steps; 0: never, and no clip is held out", "free")
    validation_clips: CountOrZero = setting(
        4,
        "clips held out for the validation loss, at most a fifth of all; costs 4 forwards each; where this holds out "
        "others, the order of the clips is another one",
        "free",
    )
    sample_every: CountOrZero = setting(200, "steps; 0: never; takes the time of a `sample` for each prompt", "free")
    sample_prompts: list[Text] = setting(
        [], """prompts of the eval videos; in a shell within single quotes, 'train.sample_prompts=["a cat"]'""", "free"
    )


class ParallelConfig(Section):
    """How many processes work together, and how they share a rendering, a training or an encoding."""

    RESUME = "free"

    num_processes: Count = setting(
        1, "processes of `prepare`, `train` and `sample` on this machine, one per GPU; with Ray, its workers"
    )
    engine: Literal["processes", "ray"] = setting(
        "processes", "of `prepare` and `sample`: what starts the workers; ray: pip install 'mochi-tune[ray]'"
    )
    ray_address: FileText | None = setting(
        None, "of parallel.engine=ray: a cluster, as auto, HOST:PORT or ray://HOST:PORT; null: one is started here"
    )
    shard: Shard | None = setting(
        None,
        "3/16: `prepare` encodes the third of 16 shares and makes no cache, `sample` renders the third of 16 shares of "
        "the videos; merge, of `prepare`: makes the cache; null: all at once",
    )
    strategy: Literal["data", "zero2", "zero3"] = setting(
        "data",
        "of `train`; data: every process has the model; zero2: DeepSpeed shards the update; zero3: the model too",
    )
    data: Count | None = setting(None, "groups of processes that render different videos; null: the cheapest layout")
    guidance: Count | None = setting(
        None, "2: prompt and negative prompt on different processes; null: the cheapest layout"
    )
    context: Count | None = setting(
        None, "processes that share the tokens of a video, any number; null: the cheapest layout, in training 1"
    )
    check_inputs: bool = setting(
        False, "true, to find a fault: processes that share a video compare what they give the DiT, at every pass"
    )
    timeout_seconds: Positive = setting(600.0, "seconds that a process waits for another before all end")


class MemoryConfig(Section):
    """Where the DiT's weights are and how precise they are while it samples; what `train` keeps in host memory."""

    RESUME = "free"

    dit: Literal["auto", "resident", "int8", "fp8", "offload", "stream", "shard"] = setting(
        "resident",
        "resident: on the GPU; int8, fp8: there in 8 bits, in `train` as resident; offload, stream: in host memory, a "
        "few blocks at a time on the GPU; shard: split over the GPUs of a video; auto: the fastest of resident and "
        "stream that fits, in `train` with activations in host memory if need be",
    )
    activations: Literal["keep", "offload"] = setting(
        "keep", "of `train`; offload: what the backward pass needs of each block waits in host memory"
    )
    t5_dtype: Literal["fp32", "bf16", "int8"] = setting(
        "fp32", "of T5 in `prepare`; fp32 takes 18 GiB of the GPU, bf16 9, int8 5; the last two round the features"
    )
    tiles: list[Whole] | None = setting(
        None, "[rows, columns]: the decoder works on tiles, in less memory, with faint seams; null: exact"
    )


class LogConfig(Section):
    """Where metrics go besides the console and metrics.jsonl."""

    RESUME = "free"

    wandb: Literal["disabled", "offline", "online"] = setting("disabled", "Weights & Biases")
    tensorboard: bool = setting(False, "true: event files in run_dir/trackers/tensorboard")
    trackio: bool = setting(False, "true: trackio on this machine; pip install 'mochi-tune[trackio]'")
    project: Annotated[Name, AfterValidator(check_project)] = setting(
        "mochi-tune", "name of the project in W&B and trackio"
    )


class PublishConfig(Section):
    """What the adapter says of itself, and where `train` uploads it at the end."""

    RESUME = "free"

    push: Repo | None = setting(
        None,
        "owner/name on the Hugging Face hub: `train` uploads the finished adapter with a model card; null: nowhere",
    )
    private: bool = setting(True, "true: a repository that push makes is private; an existing one stays as it is")
    title: Text | None = setting(None, "of the adapter; null: the run's name")
    author: Text | None = setting(None, "a name or an address; null: none is stated")
    license: Text | None = setting(None, "identifier of the hub, such as apache-2.0; null: none is stated")
    trigger: Text | None = setting(
        None, "words that a prompt needs for the adapter; null: data.caption_prefix without the punctuation at its end"
    )


class RunConfig(Section):
    """What stands outside of the sections."""

    name: Name = setting("my_lora", "names the run folder, the cache and the adapter", "free")
    run_dir: FileName = setting(
        "runs/${name}",
        "folder of checkpoints, adapter, metrics and samples; with model=toy runs/${name}_toy",
        "free",
    )
    seed: Annotated[Whole, Field(ge=0, lt=SEED_LIMIT)] = setting(0, "of every random number: adapter, noise, order")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: a GPU if there is one", "free")
    resume: Literal["auto", "force"] = setting(
        "auto", "auto: the same command goes on; force: also with settings, data or a torch that differ", "free"
    )
    resume_from: FileText | None = setting(
        None, "checkpoint folder to go on from; later ones are put aside; null: the newest complete one", "free"
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
