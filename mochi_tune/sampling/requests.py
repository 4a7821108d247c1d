"""The requests of `sample`: one prompt or a file of prompts, each with its settings and seeds."""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mochi_tune.config.load import change_sample
from mochi_tune.config.sample import SampleConfig, sample_size
from mochi_tune.config.schema import DataConfig
from mochi_tune.config.values import SEED_LIMIT
from mochi_tune.data.text_files import read_lines
from mochi_tune.errors import ConfigError, find_lone_surrogate
from mochi_tune.models.latents import FPS, check_geometry, num_visual_tokens, video_size
from mochi_tune.sampling.formats import MP4, Encoding, choose_encoding, is_file_name
from mochi_tune.sampling.sampler import PRESETS, SamplerSettings, threshold_limit

# The keys of a row of a .jsonl file and their JSON types. Except for `seed`, they are settings of `sample`.
ROW_KEYS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "negative_prompt": (str,),
    "seed": (int,),
    "num_frames": (int,),
    "height": (int,),
    "width": (int,),
    "preset": (str,),
    "steps": (int,),
    "guidance": (int, float, list),
    "threshold": (int, float),
    "linear_steps": (int,),
    "sigmas": (list,),
    "init_video": (str,),
    "init_strength": (int, float),
}
# Settings of the schedule if its noise levels are not given by `sigmas`.
SCHEDULE_KEYS = ("steps", "threshold", "linear_steps")
# Maximum visual tokens of a video: ten times those of 163 frames of 480x848.
MAX_VIDEO_TOKENS = 445_200
# Maximum bytes of the name of a video: the files next to it, and temporary files, have longer names.
MAX_NAME = 220
JSON_NAMES = {str: "text", int: "a whole number", float: "a number", list: "a list of numbers"}


@dataclass(frozen=True)
class Request:
    """One video to render."""

    prompt: str
    negative_prompt: str
    seed: int
    num_frames: int
    height: int
    width: int
    settings: SamplerSettings
    video: Path
    init_video: Path | None = None
    encoding: Encoding = MP4
    fps: float = FPS

    @property
    def is_guided(self) -> bool:
        """Whether any step uses the negative prompt."""
        return any(scale != 1 for scale in self.settings.scales)


def sampler_settings(sample: SampleConfig) -> SamplerSettings:
    """Returns the settings of the preset, overridden by those that are set.

    Raises:
        ConfigError: the schedule or the guidance does not fit the number of steps.
    """
    settings = PRESETS[sample.preset]
    for name in SCHEDULE_KEYS:
        is_given = getattr(sample, name) is not None and (name, sample.steps) != ("steps", settings.steps)
        if settings.own_sigmas is not None and is_given:
            raise ConfigError(
                f"sample.{name}={getattr(sample, name)} does not fit sample.preset={sample.preset}, whose "
                f"{settings.steps} steps are given: leave it out, or use preset=fast."
            )
    if sample.steps is not None and sample.steps != settings.steps:
        # The linear steps of a preset only fit its number of steps.
        settings = replace(settings, steps=sample.steps, linear_steps=None)
    if sample.threshold is not None:
        settings = replace(settings, threshold=sample.threshold)
    if sample.linear_steps is not None:
        settings = replace(settings, linear_steps=sample.linear_steps)
    if sample.guidance is not None:
        scales = sample.guidance
        settings = replace(settings, guidance=tuple(scales) if isinstance(scales, list) else scales)
    if sample.sigmas is not None:
        sigmas = tuple(sample.sigmas)
        if len(sigmas) < 2 or (sigmas[0], sigmas[-1]) != (1, 0) or any(a <= b for a, b in itertools.pairwise(sigmas)):
            raise ConfigError(f"sample.sigmas={list(sigmas)} is not a schedule: give falling numbers from 1 to 0.")
        others = {name: getattr(sample, name) for name in SCHEDULE_KEYS if getattr(sample, name) is not None}
        if others.get("steps") == len(sigmas) - 1:
            del others["steps"]
        if others:
            given = " and ".join(f"sample.{name}={value}" for name, value in others.items())
            verb, nulls = "does" if len(others) == 1 else "do", " ".join(f"{name}=null" for name in others)
            raise ConfigError(
                f"{given} {verb} not fit sample.sigmas of {len(sigmas) - 1} steps: leave {' and '.join(others)} out, "
                f"or write {nulls} where a conf sets {'it' if len(others) == 1 else 'them'}."
            )
        settings = replace(settings, steps=len(sigmas) - 1, linear_steps=None, own_sigmas=sigmas)
    _check_schedule(settings)
    if isinstance(settings.guidance, tuple) and len(settings.guidance) != settings.steps:
        raise ConfigError(
            f"sample.guidance has {len(settings.guidance)} numbers for {settings.steps} steps: "
            "give one, or one for each step."
        )
    return settings


def _check_schedule(settings: SamplerSettings) -> None:
    """Refuses a linear-quadratic schedule whose noise levels do not fall from 1 to 0."""
    steps, linear_steps, threshold = settings.steps, settings.linear_steps, settings.threshold
    if linear_steps is not None and linear_steps >= steps:
        advice = f"use 1 to {steps - 1}, or leave it out for half of them" if steps > 1 else "leave it out"
        raise ConfigError(f"sample.linear_steps={linear_steps} does not fit sample.steps={steps}: {advice}.")
    # Given levels are checked in `sampler_settings`, and a single step always goes from 1 to 0.
    if settings.own_sigmas is not None or steps == 1:
        return
    linear = steps // 2 if linear_steps is None else linear_steps
    limit = threshold_limit(steps, linear)
    if threshold >= limit:
        enough = next(more for more in range(linear + 1, steps) if threshold < threshold_limit(steps, more))
        # The largest number with three digits below the limit.
        unit = 10 ** (math.floor(math.log10(limit)) - 2)
        raise ConfigError(
            f"sample.threshold={threshold:g} does not fit sample.steps={steps}, {linear} of them linear: noise levels "
            f"would fall below 0 and rise again; use sample.linear_steps={enough} or more, or a sample.threshold of at "
            f"most {(math.ceil(limit / unit) - 1) * unit:.3g}."
        )


def read_requests(sample: SampleConfig, data: DataConfig, seed: int, run_dir: Path) -> list[Request]:
    """Returns the requested videos in order, each with the path of a file that does not exist yet.

    Args:
        sample: the prompt or the file of prompts, and their common settings.
        data: gives the size if `sample` does not.
        seed: used if neither the row nor `sample.seeds` gives one.
        run_dir: videos go to its folder samples/ if `sample.out` is not set.

    Raises:
        ConfigError: there is no prompt, a file cannot be read, a row is invalid (names its number), or a path exists.
    """
    rows: list[tuple[str, dict[str, Any]]]
    if sample.prompts is None:
        if not sample.prompt.strip():
            raise ConfigError('sample.prompt is empty: describe the video, such as prompt="a teacup shatters".')
        rows = [("", {"prompt": sample.prompt})]
    else:
        rows = list(read_rows(Path(sample.prompts)))
    out = Path(sample.out) if sample.out else run_dir / "samples"
    if len(name := os.fsencode(out.name)) > MAX_NAME:
        raise ConfigError(f"out={out}: the name has {len(name)} bytes: use at most {MAX_NAME}.")
    num_seeds = max(1, len(sample.seeds or []))
    paths = _VideoPaths(out, num_videos=sum(1 if "seed" in row else num_seeds for _, row in rows))
    requests: list[Request] = []
    for where, row in rows:
        own = {key: value for key, value in row.items() if key != "seed"}
        # The schedule of a row replaces that of the command.
        if "sigmas" in row:
            own = dict.fromkeys(SCHEDULE_KEYS) | own
        elif any(key in row for key in SCHEDULE_KEYS):
            own["sigmas"] = None
        try:
            mine = change_sample(sample, own)
            settings, size = sampler_settings(mine), sample_size(mine, data)
            init_video, start_sigma = _start_of(mine)
            settings = replace(settings, start_sigma=start_sigma)
            check_geometry(*size)
            check_size(*size)
            encoding = choose_encoding(mine, size[0])
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from None
        for number in [row["seed"]] if "seed" in row else sample.seeds or [seed]:
            if not 0 <= number < SEED_LIMIT:
                raise ConfigError(f"{where}seed={number} is not possible: it must be from 0 to below 2**63.")
            # Several PNG pictures are written to a folder.
            suffix = "" if encoding.format == "png" and size[0] > 1 else f".{encoding.format}"
            video = paths.take(mine.prompt, number, suffix)
            requests.append(
                Request(
                    mine.prompt,
                    mine.negative_prompt,
                    number,
                    *size,
                    settings,
                    video,
                    init_video,
                    encoding,
                    rate_of(mine),
                )
            )
    return requests


def rate_of(sample: SampleConfig) -> float:
    """Returns the frames per second of videos; whole ones as int, as records of earlier versions have them."""
    return int(sample.fps) if sample.fps.is_integer() else sample.fps


def request_of_latents(sample: SampleConfig, shape: Sequence[int], record: Mapping[str, Any]) -> Request:
    """Returns the request of a video that is decoded from the file `sample.latents`, next to it if `out` is not set.

    Args:
        sample: settings of the video's file.
        shape: shape of its latents, (1, C, T, h, w).
        record: what is known of how they were sampled, see `record.describe`.

    Raises:
        ConfigError: the latents have a size that is no video's, or the settings of the file do not fit or it exists.
    """
    assert sample.latents is not None
    source = Path(sample.latents)
    size = video_size(*shape[-3:])
    try:
        check_geometry(*size)
        check_size(*size)
    except ConfigError as error:
        raise ConfigError(f"sample.latents={source}: {error}") from None
    encoding, out = choose_encoding(sample, size[0]), Path(sample.out) if sample.out else source.parent
    suffix = "" if encoding.format == "png" and size[0] > 1 else f".{encoding.format}"
    if is_file_name(out):
        _check_free(out, source)
        video = out
    else:
        names = (f"{source.stem}{'' if number == 1 else f'_{number}'}" for number in itertools.count(1))
        videos = (out / f"{name}{suffix}" for name in names)
        video = next(v for v in videos if not v.exists() and not v.with_suffix(".json").exists())
    prompts = (str(record.get("prompt", "")), str(record.get("negative_prompt", "")))
    return Request(*prompts, 0, *size, PRESETS["quality"], video, None, encoding, rate_of(sample))


def _start_of(sample: SampleConfig) -> tuple[Path | None, float]:
    """Returns the video or image that sampling starts from, if any, and the initial noise level."""
    if sample.init_video is not None:
        path = Path(sample.init_video)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise ConfigError(f"sample.init_video={path} {what}: name a video or an image.")
        return path, sample.init_strength
    if sample.init_strength != SampleConfig.model_fields["init_strength"].default:
        raise ConfigError(
            f"sample.init_strength={sample.init_strength} does nothing without sample.init_video: name a video or an "
            "image there, or leave it out."
        )
    return None, 1.0


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the location, a prefix for errors, and the content of each row of a file of prompts, except blank ones.

    Raises:
        ConfigError: the file cannot be read, or a row is invalid.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(
            f"sample.prompts={path} is not a .txt or .jsonl file: write one prompt, or one object, per line."
        )
    try:
        lines = read_lines(path)
    except FileNotFoundError:
        raise ConfigError(f"sample.prompts={path} does not exist: name a .txt or .jsonl file.") from None
    except IsADirectoryError:
        raise ConfigError(f"sample.prompts={path} is a folder: name a .txt or .jsonl file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"sample.prompts={path} is not UTF-8 text ({error.reason}): save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"sample.prompts={path} cannot be read ({error.strerror}).") from None
    rows = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError(f"sample.prompts={path} has no prompts: write one per line.")
    for number, line in rows:
        where = f"{path} row {number}: "
        yield where, {"prompt": line} if path.suffix == ".txt" else _read_object(where, line)


def _read_object(where: str, line: str) -> dict[str, Any]:
    def read_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for key, value in pairs:
            if key in row:
                raise ConfigError(f"{where}{key} is given twice: leave one out.")
            row[key] = value
        return row

    try:
        row = json.loads(line, object_pairs_hook=read_pairs)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}not JSON ({error.msg} at column {error.colno}).") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}not JSON that can be read ({error}).") from None
    half = find_lone_surrogate(json.dumps(row, ensure_ascii=False))
    if half is not None:
        raise ConfigError(f"{where}it holds half of a character, {half}: write the whole character.")
    if not isinstance(row, dict):
        raise ConfigError(f'{where}{line[:40]} is not an object: write {{"prompt": "a teacup shatters"}}.')
    if not str(row.get("prompt", "")).strip():
        raise ConfigError(f'{where}it has no prompt: write {{"prompt": "a teacup shatters"}}.')
    for key, value in row.items():
        if key not in ROW_KEYS:
            raise ConfigError(f"{where}{key} is not a key of a row: use {', '.join(ROW_KEYS)}.")
        fits = isinstance(value, ROW_KEYS[key]) and not isinstance(value, bool)
        if isinstance(value, list):
            fits = fits and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
        if not fits:
            allowed = " or ".join(JSON_NAMES[t] for t in ROW_KEYS[key])
            raise ConfigError(f"{where}{key}={json.dumps(value)} does not fit: it takes {allowed}.")
    return row


def check_size(num_frames: int, height: int, width: int) -> None:
    """Refuses videos that are too large to render.

    Raises:
        ConfigError: the video has more than MAX_VIDEO_TOKENS visual tokens.
    """
    tokens = num_visual_tokens(num_frames, height, width)
    if tokens > MAX_VIDEO_TOKENS:
        raise ConfigError(
            f"{num_frames} frames of {height}x{width} are {tokens} visual tokens, the maximum is {MAX_VIDEO_TOKENS}: "
            "use fewer frames, or a smaller sample.height and sample.width; Mochi's native size is 480x848."
        )


class _VideoPaths:
    """Chooses a path for each video: the given file, or a new name in a folder."""

    def __init__(self, path: Path, num_videos: int) -> None:
        is_file = is_file_name(path)
        self.single = path if is_file else None
        self.folder = path
        # Listed once, because there may be thousands of files and as many requests.
        entries = path.iterdir() if not is_file and path.is_dir() else ()
        self.taken = {entry.name.partition(".")[0] for entry in entries}
        if is_file and num_videos > 1:
            raise ConfigError(f"out={path} is a file, but {num_videos} videos are requested: name a folder.")

    def take(self, prompt: str, seed: int, suffix: str) -> Path:
        if self.single is not None:
            _check_free(self.single)
            return self.single
        words = re.sub(r"\W+", "_", prompt.lower()).strip("_")[:40]
        stem, number = f"{words or 'prompt'}_seed_{seed}", 1
        while True:
            name = f"{stem}_{number:03d}"
            if name not in self.taken:
                self.taken.add(name)
                return self.folder / f"{name}{suffix}"
            number += 1


def _check_free(path: Path, own: Path | None = None) -> None:
    for taken in (path, path.with_suffix(".json"), path.with_suffix(".safetensors")):
        if taken.exists() and not (own is not None and taken.samefile(own)):
            raise ConfigError(f"out={path}: {taken} exists and is never overwritten: use another name.")
