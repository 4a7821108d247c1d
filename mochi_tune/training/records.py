"""Reads the records of an adapter from its run folder: settings, counts, validation losses and sample videos."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mochi_tune.config.load import load_config
from mochi_tune.files import file_sha256, parse_object, read_json_lines
from mochi_tune.training.eval_files import find_eval_videos, prompt_of
from mochi_tune.training.metrics import FILES, comparable
from mochi_tune.training.resume import read_clips
from mochi_tune.training.run_folder import read_history

if TYPE_CHECKING:
    from mochi_tune.config.schema import RunConfig


@dataclass(frozen=True)
class SampleVideo:
    """A video of a run.

    Attributes:
        file: the .mp4 file.
        prompt: the prompt of the video.
        is_compared: whether it shows the base on the left and the adapter on the right.
    """

    file: Path
    prompt: str
    is_compared: bool


@dataclass(frozen=True)
class RunRecords:
    """The records of a run up to the step of an adapter.

    Attributes:
        config: the settings.
        step: the step of the adapter.
        date: time of the last start, ISO 8601, or "" if the run did not record it.
        num_clips: number of clips in the cache.
        num_trained: number of clips that were trained on.
        global_batch: clips per step, over all processes.
        seconds: duration of all steps together.
        losses: (step, validation loss) of comparable validations.
        is_held_out: whether all validations used held-out clips.
        videos: videos of the adapter.
        environment: the last row of the history, with the environment of that start.
    """

    config: "RunConfig"
    step: int
    date: str
    num_clips: int
    num_trained: int
    global_batch: int
    seconds: float
    losses: list[tuple[int, float]]
    is_held_out: bool
    videos: list[SampleVideo]
    environment: dict


def find_run_dir(adapter: Path) -> Path | None:
    """Returns the run folder of an adapter file, which may be in one of its checkpoints; None if there is none."""
    for folder in (adapter.parent, *adapter.parents[2:3]):
        is_own = folder == adapter.parent or adapter.parents[1].name == "checkpoints"
        if is_own and (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file():
            return folder
    return None


def run_date(run_dir: Path) -> str:
    """Returns the time of the last start of a run, ISO 8601, or "" if the run did not record it."""
    return next((start["date"] for start in reversed(read_history(run_dir)) if start.get("date")), "")


def read_run(run_dir: Path, adapter: Path, step: int) -> RunRecords:
    """Reads the records of a run.

    Args:
        run_dir: the run folder.
        adapter: the adapter file.
        step: the step of the adapter; later rows and videos are left out.

    Raises:
        ConfigError: this version cannot read the config.yaml of the run.
    """
    config = load_config(str(run_dir / "config.yaml"), [])
    rows, validations = (
        [row for row in read_json_lines(run_dir / f"{name}.jsonl") if row.get("step", step + 1) <= step]
        for name in FILES
    )
    clips = [row.get("clips", []) for row in rows]
    losses = [(row["step"], row.get("validation_loss")) for row in comparable(validations)]
    return RunRecords(
        config=config,
        step=step,
        date=run_date(run_dir),
        num_clips=len(read_clips(run_dir).get("clips", {})),
        num_trained=len({clip for each in clips for clip in each}),
        global_batch=max((len(each) for each in clips), default=0),
        seconds=sum(row.get("seconds", 0) for row in rows),
        losses=[(at, loss) for at, loss in losses if loss is not None and math.isfinite(loss)],
        is_held_out=all(row.get("held_out") for row in validations),
        videos=_eval_videos(run_dir, config.train.sample_prompts, step) + _rendered_videos(run_dir, adapter),
        environment=(read_history(run_dir) or [{}])[-1],
    )


def _eval_videos(run_dir: Path, prompts: list[str], step: int) -> list[SampleVideo]:
    """Returns the newest eval video of each prompt up to a step, without step 0, which shows the base."""
    found = {
        number: path
        for at, number, path in find_eval_videos(run_dir)
        if 0 < at <= step and number < len(prompts) and path.suffix == ".mp4"
    }
    return [SampleVideo(path, prompt_of(path, number, prompts), True) for number, path in sorted(found.items())]


def _rendered_videos(run_dir: Path, adapter: Path) -> list[SampleVideo]:
    """Returns the videos that `sample` rendered with only this adapter at strength 1."""
    sha256, videos = file_sha256(adapter), []
    for path in sorted((run_dir / "samples").glob("*.mp4")):
        record = path.with_suffix(".json")
        facts = parse_object(record.read_bytes()) if record.is_file() else None
        used = (facts or {}).get("adapters") or []
        # Strengths by step or block, or an initial video, would not show what the adapter itself does.
        is_plain = facts is not None and "init_video" not in facts
        is_whole = len(used) == 1 and not {"strength_schedule", "block_strength"} & used[0].keys()
        if facts and is_plain and is_whole and used[0].get("sha256") == sha256 and used[0].get("strength") == 1:
            videos.append(
                SampleVideo(path, str(facts.get("prompt", "")), facts.get("side_by_side") == ["base", "adapted"])
            )
    return videos
