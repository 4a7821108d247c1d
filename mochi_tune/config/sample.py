"""The settings of `sample` and of a run's eval videos."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mochi_tune.config.values import (
    Count,
    CountOrZero,
    FileText,
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


# All noise levels of a rendering are listed; 64 steps are usual.
Steps = Annotated[Count, Field(le=10_000)]


def _read_none(value: Any) -> Any:
    # In a shell without quotes, as [] is not.
    return [] if value == "none" else value


class SampleConfig(Section):
    """The sampler, for `sample` and for the eval videos of `train`. `sample` takes these keys without `sample.`."""

    RESUME = "free"

    prompt: Text = setting("", "what to render")
    prompts: FileText | None = setting(
        None, "instead of prompt: file.txt, one prompt per line, or file.jsonl, one object per line with its settings"
    )
    negative_prompt: Text = setting("", "what guidance leads away from")
    seeds: list[Whole] | None = setting(None, "renders each prompt without a seed of its own with each; null: seed")
    grid: bool = setting(
        False, "true: a page and a video of every prompt with every seed, checkpoint and strength, in the folder out"
    )
    strengths: list[Number] | None = setting(
        None,
        "grid, parallel.shard or parallel.engine=ray: factors on adapter_strength; 0 is exactly the base; null: 1",
    )
    checkpoints: list[Count] | Literal["all"] | None = setting(
        None,
        "grid, parallel.shard or parallel.engine=ray: steps of the run's checkpoints, whose adapters are used; null: "
        "adapter",
    )
    compare: Literal["base"] | None = setting(
        None, "base: renders without and with the adapter, side by side in one video"
    )
    adapter: Annotated[FileText | list[FileText] | None, BeforeValidator(_read_none)] = setting(
        None,
        "file, folder or hub:OWNER/NAME[/FILE][@REVISION], or a list of such; none: the base; null: the run's "
        "adapter.safetensors",
    )
    adapter_alpha: Positive | list[Positive] | None = setting(
        None, "alpha of an adapter that does not state its own, or [x, y] for several; null: taken to be its rank"
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
    init_video: FileText | None = setting(
        None, "video or image to start from, cut and resized as by `prepare`; an image is shown in every frame"
    )
    init_strength: Annotated[Number, Field(ge=0, le=1)] = setting(
        0.8, "noise level that is put on init_video; 1: nothing of it is left; 0: it comes back through the VAE"
    )
    out: FileText | None = setting(
        None, "file.mp4, .webm, .gif, .webp or .png, or a folder; null: new names in run_dir/samples"
    )
    format: Literal["mp4", "webm", "gif", "webp", "png"] | None = setting(
        None, "of videos; png: a folder of pictures for each; null: as out ends, else png for one frame, mp4 for more"
    )
    codec: Literal["h264", "hevc", "av1", "vp9"] | None = setting(
        None, "in mp4 h264, hevc or av1, in webm vp9 or av1; null: the first of these"
    )
    crf: CountOrZero | None = setting(
        None,
        "quality, lower is better: h264 and hevc 0 to 51, vp9 0 to 63, av1 1 to 63; 0 is lossless; null: h264 17, "
        "others 16",
    )
    metadata: bool = setting(True, "false: writes no prompt and no settings into the video; the .json has them always")
    prompt_cache: Text = setting(
        "~/.cache/mochi_tune/prompts", "folder of the prompts' T5 features, 4 MB per prompt at most"
    )
    save_latents: bool = setting(False, "true: writes the latents beside the video as .safetensors")
    compile: bool | None = setting(
        None, "true: compiles the DiT's blocks, a minute once, and each step is shorter; null: on a GPU, if that pays"
    )
    num_frames: Whole | None = setting(None, "frames, 6k+1; null: data.num_frames")
    height: Whole | None = setting(None, "pixels, a multiple of 16; null: data.height")
    width: Whole | None = setting(None, "pixels, a multiple of 16; null: data.width")
    preset: Literal["quality", "balanced", "fast", "fastmochi"] = setting(
        "quality",
        "quality: 64 steps, guidance 6; balanced: without guidance in the last quarter, which takes an eighth of the "
        "time off; fast: 8 steps, guidance 1.5, for distilled weights; fastmochi: the 8 noise levels of FastMochi",
    )
    steps: Steps | None = setting(None, "Euler steps; time grows with it; null: the preset's")
    guidance: NotNegative | list[NotNegative] | None = setting(
        None, "weight of the prompt, or a list with one per step; 1 halves the time; null: the preset's"
    )
    sigmas: list[Number] | None = setting(None, "noise levels from 1 to 0, instead of steps and threshold")
    threshold: Annotated[Number, Field(gt=0, lt=1)] | None = setting(
        None, "how far below 1 the linear part of the schedule goes; null: the preset's"
    )
    linear_steps: Steps | None = setting(None, "steps of the linear part; null: half of them")


def sample_size(sample: SampleConfig, data: "DataConfig") -> tuple[int, int, int]:
    """Returns the number of frames, the height and the width to render: the sample's own, else the data's."""
    return (
        data.num_frames if sample.num_frames is None else sample.num_frames,
        data.height if sample.height is None else sample.height,
        data.width if sample.width is None else sample.width,
    )
