"""The settings of `sample` and of a run's eval videos."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mochi_tune.config.values import (
    Count,
    CountOrZero,
    FileName,
    Name,
    NotNegative,
    Number,
    Positive,
    Section,
    Text,
    Whole,
    setting,
)

if TYPE_CHECKING:
    from mochi_tune.config.schema import DataConfig


# The noise levels of a rendering are kept as a list; 64 steps are usual.
Steps = Annotated[Count, Field(le=10_000)]


def _read_none(value: Any) -> Any:
    # Unlike [], it needs no quotes in a shell.
    return [] if value == "none" else value


class SampleConfig(Section):
    """The sampler of `sample` and of the eval videos of `train`. `sample` also takes these keys without `sample.`."""

    RESUME = "free"

    prompt: Text = setting("", "what to render")
    prompts: FileName | None = setting(
        None, "instead of prompt: file.txt, one prompt per line, or file.jsonl, one object per line with its settings"
    )
    negative_prompt: Text = setting("", "prompt that guidance leads away from")
    seeds: list[Whole] | None = setting(None, "seeds of each prompt without its own seed; null: seed")
    grid: bool = setting(
        False,
        "true: renders every prompt with every seed, checkpoint and strength as a page and a video in out",
    )
    strengths: list[Number] | None = setting(
        None,
        "for grid, parallel.shard or parallel.engine=ray: factors on adapter_strength; 0 is exactly the base; null: 1",
    )
    checkpoints: list[Count] | Literal["all"] | None = setting(
        None,
        "for grid, parallel.shard or parallel.engine=ray: steps of checkpoints of the run whose adapters are used; "
        "null: adapter",
    )
    compare: Literal["base"] | None = setting(
        None, "base: renders without and with the adapter, side by side in one video"
    )
    adapter: Annotated[FileName | list[FileName] | None, BeforeValidator(_read_none)] = setting(
        None,
        "file, folder or hub:OWNER/NAME[/FILE][@REVISION], or a list of these; none: the base; null: the run's "
        "adapter.safetensors",
    )
    adapter_alpha: Positive | list[Positive] | None = setting(
        None, "alpha of an adapter that does not state it, or [x, y] for several; null: its rank"
    )
    adapter_strength: Number | list[Number] = setting(
        1.0, "factor on the adapter; 0 is exactly the base; [x, y] for several adapters"
    )
    strength_schedule: list[Number] | list[list[Number]] | None = setting(
        None,
        "further factors on the adapter, spread evenly over the steps and linear in between: [1, 0] fades it out; "
        "[[1, 0], [0, 1]] for several adapters",
    )
    block_strength: dict[Text, Number] | list[dict[Text, Number]] = setting(
        {}, "further factors on the adapter by block, {0-15: 0.5, 47: 0}; [{0-15: 0.5}, {}] for several adapters"
    )
    init_video: FileName | None = setting(
        None, "video or image to start from, cut and resized as by `prepare`; an image is shown in every frame"
    )
    init_strength: Annotated[Number, Field(ge=0, le=1)] = setting(
        0.8, "noise level added to init_video; 1: nothing of it is left; 0: only encoded and decoded by the VAE"
    )
    out: FileName | None = setting(
        None, "file.mp4, .webm, .gif, .webp or .png, or a folder; null: new names in run_dir/samples"
    )
    format: Literal["mp4", "webm", "gif", "webp", "png"] | None = setting(
        None,
        "format of videos; png: a folder of images for each; null: by the suffix of out, else png for one frame and "
        "mp4",
    )
    fps: Annotated[Number, Field(ge=1, le=120)] = setting(
        30.0, "frames per second of videos; 30: Mochi's rate; 24: for an adapter of clips of 24 that were retimed"
    )
    codec: Literal["h264", "hevc", "av1", "vp9"] | None = setting(
        None, "mp4: h264, hevc or av1; webm: vp9 or av1; null: the first of these"
    )
    crf: CountOrZero | None = setting(
        None,
        "quality, lower is better: h264 and hevc 0 to 51, vp9 0 to 63, av1 1 to 63; 0 is lossless; null: h264 17, "
        "others 16",
    )
    metadata: bool = setting(True, "false: writes no prompt and no settings into the video; the .json always has them")
    prompt_cache: Name = setting(
        "~/.cache/mochi_tune/prompts", "folder of the prompts' T5 features, at most 4 MB per prompt"
    )
    save_latents: bool = setting(False, "true: keeps the latents next to the video as .safetensors")
    latents: FileName | None = setting(
        None, "file of latents that `sample` has kept: only decodes it, without its prompt, T5 and the DiT"
    )
    compile: bool | None = setting(
        None, "true: compiles the DiT's blocks, a minute once, for faster steps; null: on a GPU, if it saves time"
    )
    num_frames: Whole | None = setting(None, "frames, 6k+1; null: data.num_frames")
    height: Whole | None = setting(None, "pixels, a multiple of 16; null: data.height")
    width: Whole | None = setting(None, "pixels, a multiple of 16; null: data.width")
    preset: Literal["quality", "balanced", "fast", "fastmochi"] = setting(
        "quality",
        "quality: 64 steps, guidance 6; balanced: no guidance in the last quarter, which saves an eighth of the time; "
        "fast: 8 steps, guidance 1.5, for distilled weights; fastmochi: the 8 noise levels of FastMochi",
    )
    steps: Steps | None = setting(None, "Euler steps; time grows with it; null: the preset's")
    guidance: NotNegative | list[NotNegative] | None = setting(
        None, "weight of the prompt, or a list with one per step; 1 halves the time; null: the preset's"
    )
    sigmas: list[Number] | None = setting(None, "noise levels from 1 to 0, instead of steps and threshold")
    threshold: Annotated[Number, Field(gt=0, lt=1)] | None = setting(
        None, "how far below 1 the linear part of the schedule goes; null: the preset's"
    )
    linear_steps: Steps | None = setting(None, "steps of the linear part; null: the preset's, or half of steps")


def sample_size(sample: SampleConfig, data: "DataConfig") -> tuple[int, int, int]:
    """Returns the number of frames, the height and the width to render: the sample's own, else the data's."""
    return (
        data.num_frames if sample.num_frames is None else sample.num_frames,
        data.height if sample.height is None else sample.height,
        data.width if sample.width is None else sample.width,
    )
