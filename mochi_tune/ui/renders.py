"""The videos that `sample` has rendered, and the form for new ones."""

import contextlib
import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from mochi_tune.config.explain import nearest
from mochi_tune.config.load import SAMPLE_ALIASES, load_config, quote
from mochi_tune.errors import CheckpointError, ConfigError, DataError, MochiTuneError
from mochi_tune.files import file_sha256, parse_object, write_atomic
from mochi_tune.sampling.adapters import check_has_adapter
from mochi_tune.sampling.requests import read_requests
from mochi_tune.ui.adapters import check_adapter, number_of
from mochi_tune.ui.confs import PATHS, as_text, check_paths, conf_path
from mochi_tune.ui.folder import OWN_FOLDER, inside, relative
from mochi_tune.ui.jobs import is_queued
from mochi_tune.ui.runs import folder_state

# Default folders of `sample`: single videos, and the cells of grids.
PLACES = ("runs/*/samples", "runs/*/grids/*/cells")
GRIDS = "runs/*/grids/*/index.html"
SUFFIXES = (".mp4", ".webm", ".gif", ".webp", ".png")
Kind = Literal["videos", "compare", "grid"]
# Choice of no adapter, not even that of the run.
BASE = "base"
# Settings of a video with a separate field.
SIZES = ("num_frames", "height", "width", "steps")
OWN_KEYS = (
    "prompt", "prompts", "negative_prompt", "seeds", *SIZES, "adapter", "adapter_strength", "compare", "grid",
    "strengths", "checkpoints", "out",
)  # fmt: skip


@dataclass(frozen=True)
class Render:
    """A rendered video."""

    video: Path
    modified: float

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """The settings in the .json next to the video, read on first use; {} if the file was removed meanwhile."""
        try:
            record = parse_object(self.video.with_suffix(".json").read_bytes())
        except OSError:
            return {}
        return record if record and _is_record(record) else {}


@dataclass(frozen=True)
class Grid:
    """A complete grid: its page, which plays the cells, and its video of all cells."""

    page: Path
    video: Path
    num_cells: int
    modified: float


@dataclass(frozen=True)
class SampleForm:
    """A request to render videos, as the user has filled it in.

    Attributes:
        prompts: one or several prompts, one per line.
        negative_prompt: prompt that guidance leads away from.
        seeds: seeds, separated by spaces or commas; "" for those of the conf.
        sizes: key of SIZES -> text; "" stands for the default.
        adapters: (file, `hub:OWNER/NAME` or BASE; strength) of each adapter. Empty, or a first file of "": the adapter
            of the run.
        kind: single videos, videos next to the base model's, or a grid.
        strengths: factors on the strengths in a grid, separated by spaces or commas.
        checkpoints: checkpoints in a grid: "all", or steps of the run, separated by spaces or commas; "" for none.
        more: other settings of `sample`, one `key=value` per line.
    """

    prompts: str
    negative_prompt: str = ""
    seeds: str = ""
    sizes: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[tuple[str, str], ...] = ()
    kind: Kind = "videos"
    strengths: str = ""
    checkpoints: str = ""
    more: str = ""


def list_renders(folder: Path) -> list[Render]:
    """Returns the videos of all runs that have their settings in a .json file, the newest first."""
    found = []
    for place in _places(folder):
        files = _files(place)
        for record in [record for name, record in files.items() if name.endswith(".json")]:
            names = (record.name.removesuffix(".json") + suffix for suffix in SUFFIXES)
            video = next((files[name] for name in names if name in files), None)
            # Leaves out files that were removed meanwhile, and links that lead out of the folder.
            with contextlib.suppress(OSError, DataError):
                if video and _belong_together(folder, record, video):
                    found.append((-video.stat().st_mtime, video.path))
    return [Render(Path(path), -modified) for modified, path in sorted(found)]


def _files(place: Path) -> dict[str, os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            return {entry.name: entry for entry in entries if _is_file(entry)}
    except OSError:
        # The folder was removed meanwhile, or belongs to another user.
        return {}


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        # A link that leads to itself.
        return False


def _belong_together(folder: Path, record: os.DirEntry[str], video: os.DirEntry[str]) -> bool:
    for link in (each for each in (record, video) if each.is_symlink()):
        inside(folder, link.path)
    facts = record.stat()
    return _has_record(record.path, facts.st_mtime_ns, facts.st_size)


def find_render(folder: Path, name: str) -> Render:
    """Returns the rendered video of a path in the folder.

    Raises:
        DataError: it is not in `list_renders`, or the path leads out of the folder.
    """
    path = inside(folder, name)
    # A link may have another name than the video that it leads to.
    maybe = (each for each in list_renders(folder) if each.video.name == path.name or each.video.is_symlink())
    render = next((each for each in maybe if inside(folder, each.video) == path), None)
    if render is None or not render.record:
        raise DataError(f"{name} does not exist any more: choose another video.")
    return render


def _places(folder: Path) -> list[Path]:
    """Returns the folders of PLACES, without those behind a link that leads out of the page's folder."""
    root = folder.resolve()
    found = [path for place in PLACES for path in folder.glob(place) if path.is_dir()]
    return [path for path in found if path.resolve().is_relative_to(root)]


@lru_cache(maxsize=2**16)
def _has_record(path: str, _modified: int, _size: int) -> bool:
    """Whether a file contains a record. Cached, because there may be thousands of them and a page shows twelve."""
    record = parse_object(Path(path).read_bytes())
    return record is not None and _is_record(record)


def _is_record(record: Mapping[str, Any]) -> bool:
    """Whether the content of a JSON file is a record of `sample`, and not of another program."""
    adapters = record.get("adapters") or []
    return (
        isinstance(record.get("prompt"), str)
        and isinstance(record.get("sampler") or {}, dict)
        and isinstance(record.get("init_video") or {}, dict)
        and isinstance(adapters, list)
        and all(isinstance(each, dict) and _is_finite(each.get("strength", 1)) for each in adapters)
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def list_grids(folder: Path) -> list[Grid]:
    """Returns the finished grids of the folder's runs, the newest first."""
    found = []
    for page in folder.glob(GRIDS):
        num_cells = len(list((page.parent / "cells").glob("*.json")))
        # Leaves out grids that are removed meanwhile.
        with contextlib.suppress(OSError):
            found.append(Grid(page, page.with_name("grid.mp4"), num_cells, page.stat().st_mtime))
    return sorted(found, key=lambda grid: -grid.modified)


def renders_state(folder: Path) -> list[Any]:
    """Returns a state that changes with the videos and grids."""
    return [sorted((str(path), folder_state(path)) for path in _places(folder)), list_grids(folder)]


def run_of(folder: Path, video: Path) -> str:
    """Returns the run folder of a video in PLACES, as a path in the folder."""
    return "/".join(relative(folder, video).split("/")[:2])


def facts_of(record: Mapping[str, Any]) -> str:
    """Returns the main settings of a video in one line."""
    sampler, adapters = record.get("sampler") or {}, record.get("adapters") or []
    size = f"{record.get('num_frames')} frames, {record.get('width')} x {record.get('height')}"
    parts = [f"seed {record.get('seed')}", size, f"{sampler.get('steps')} steps"]
    if record.get("side_by_side") == ["base", "adapted"]:
        parts.append("base | LoRA")
    return " · ".join(parts + ([] if adapters else ["the base"]))


def adapters_of(folder: Path, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the adapters of a video and their strengths, as in `SampleForm`."""
    found = []
    for adapter in record.get("adapters") or []:
        name, strength = str(adapter.get("file", "")), adapter.get("strength", 1)
        # A file outside of the folder keeps its name. The form refuses it when the job is started.
        with contextlib.suppress(MochiTuneError):
            name = relative(folder, inside(folder, name))
        found.append((name, as_text(int(strength) if strength == int(strength) else strength)))
    return found


def changed_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Returns the adapter files and the start video of a video that have changed since it was rendered."""
    found = []
    for each in (*(record.get("adapters") or []), record.get("init_video") or {}):
        # The form refuses missing files and files outside of the folder when the job is started.
        with contextlib.suppress(MochiTuneError, OSError):
            path = inside(folder, str(each.get("file", "")))
            if "sha256" in each and file_sha256(path) != each["sha256"]:
                found.append(relative(folder, path))
    return found


def form_of(folder: Path, record: Mapping[str, Any]) -> SampleForm:
    """Returns the form that renders a video again."""
    sampler = dict(record.get("sampler") or {})
    sizes = {key: str(record[key]) for key in ("num_frames", "height", "width") if key in record}
    more: dict[str, Any] = {}
    if own := sampler.get("own_sigmas"):
        more["sigmas"] = own
    else:
        sizes["steps"] = str(sampler.get("steps", ""))
        more |= {k: sampler[k] for k in ("threshold", "linear_steps") if sampler.get(k) is not None}
    if sampler.get("guided"):
        more["preset"] = "balanced"
    if sampler.get("guidance") is not None:
        more["guidance"] = sampler["guidance"]
    adapters = adapters_of(folder, record) or [(BASE, "")]
    records = record.get("adapters") or []
    for key, nothing in (("strength_schedule", [1]), ("block_strength", {})):
        if any(key in each for each in records):
            values = [each.get(key, nothing) for each in records]
            more[key] = values if len(values) > 1 else values[0]
    if start := record.get("init_video"):
        more |= {"init_video": str(start.get("file", "")), "init_strength": start.get("strength")}
    return SampleForm(
        prompts=" ".join(str(record["prompt"]).split("\n")),
        negative_prompt=str(record.get("negative_prompt") or ""),
        seeds=str(record.get("seed", "")),
        sizes=sizes,
        adapters=tuple(adapters),
        kind="compare" if record.get("side_by_side") == ["base", "adapted"] else "videos",
        more="\n".join(f"{key}={as_text(value)}" for key, value in more.items()),
    )


def arguments_of(folder: Path, conf: str, form: SampleForm) -> list[str]:
    """Returns the arguments of `sample`, checked as `sample` does before it reads weights.

    Writes several prompts to a file in the page's own folder.

    Raises:
        MochiTuneError: a setting does not fit, an adapter does not exist, or none is chosen and the run has none.
    """
    prompts = [line.strip() for line in form.prompts.splitlines() if line.strip()]
    given = {"negative_prompt": form.negative_prompt.strip()} if form.negative_prompt.strip() else {}
    given |= {"seeds": f"[{', '.join(_whole_numbers('seeds', form.seeds))}]"} if form.seeds.strip() else {}
    given |= {key: text.strip() for key, text in form.sizes.items() if text.strip()}
    given |= _adapters(folder, form)
    given |= {"compare": "base"} if form.kind == "compare" else _grid(form) if form.kind == "grid" else {}
    for key, value in _more(form.more):
        if key in given:
            raise ConfigError(f"{key} is given twice: remove it from the other settings.")
        given[key] = value
    if len(prompts) > 1:
        given["prompts"] = _write_prompts(folder, prompts, writes=False)
    _check(folder, conf, prompts, given)
    if len(prompts) > 1:
        _write_prompts(folder, prompts, writes=True)
        return [f"conf={conf}", *(f"{key}={value}" for key, value in given.items())]
    return [f"conf={conf}", f"prompt={prompts[0]}", *(f"{key}={value}" for key, value in given.items())]


def _check(folder: Path, conf: str, prompts: list[str], given: Mapping[str, str]) -> None:
    plain = {key: value for key, value in given.items() if key != "prompts"}
    for prompt in prompts or [""]:
        overrides = [f"sample.{key}={value}" for key, value in {"prompt": prompt, **plain}.items()]
        config = load_config(str(conf_path(folder, conf)), overrides)
        check_paths(folder, config, [key for key in PATHS if key.startswith("sample.")])
        # Relative paths are relative to the folder, in which the verb will run.
        run_dir = inside(folder, config.run_dir)
        read_requests(config.sample, config.data, config.seed, run_dir)
        try:
            check_has_adapter(config.sample, run_dir)
        except CheckpointError:
            # A training in the queue ends before this job starts.
            if not is_queued(folder, "train", conf):
                raise ConfigError(f"{conf} is not trained yet: choose an adapter, or none: the base.") from None


# The conf may have settings that only adapters take.
_OF_THE_BASE = {
    "adapter": "none", "adapter_strength": "1", "strength_schedule": "null", "block_strength": "{}",
    "adapter_alpha": "null",
}  # fmt: skip


def _adapters(folder: Path, form: SampleForm) -> dict[str, str]:
    """Returns the settings of the chosen adapters, {} for the adapter of the run with the strength of the conf."""
    named = [(name, strength.strip() or "1") for name, strength in form.adapters if name and name != BASE]
    chosen = [(check_adapter(folder, name), strength) for name, strength in named]
    first, first_strength = form.adapters[0] if form.adapters else ("", "")
    if chosen and not first:
        raise ConfigError("the run's own adapter takes no others beside it: choose its file from the list.")
    for _, strength in chosen or [(first, first_strength.strip() or "1")]:
        number_of("adapter_strength", strength)
    if not first:
        return {"adapter_strength": first_strength.strip()} if first_strength.strip() not in ("", "1") else {}
    if first == BASE and not chosen:
        if form.kind == "compare" or (form.kind == "grid" and form.strengths.strip()):
            raise ConfigError("the base has no strengths, and nothing to compare it with: choose an adapter.")
        return _OF_THE_BASE
    if len(chosen) > 1:
        files, strengths = zip(*chosen, strict=True)
        return {"adapter": f"[{', '.join(map(quote, files))}]", "adapter_strength": f"[{', '.join(strengths)}]"}
    return {"adapter": chosen[0][0], "adapter_strength": chosen[0][1]}


def _grid(form: SampleForm) -> dict[str, str]:
    given = {"grid": "true"}
    if texts := form.strengths.replace(",", " ").split():
        for text in texts:
            number_of("strengths", text)
        given["strengths"] = f"[{', '.join(texts)}]"
    if steps := form.checkpoints.strip():
        given["checkpoints"] = "all" if steps == "all" else f"[{', '.join(_whole_numbers('checkpoints', steps))}]"
    return given


def _more(text: str) -> list[tuple[str, str]]:
    lines = [line.strip() for line in text.splitlines()]
    pairs = []
    for line in [line for line in lines if line and not line.startswith("#")]:
        key, equals, value = line.partition("=")
        key = key.strip().removeprefix("sample.")
        if key in OWN_KEYS:
            raise ConfigError(f"{key} has a separate field, or is chosen by the page: remove it here.")
        if not equals or key not in SAMPLE_ALIASES:
            raise ConfigError(f"{line} is not a setting of `sample`{nearest(key, SAMPLE_ALIASES)}")
        pairs.append((key, value.strip()))
    return pairs


def _whole_numbers(key: str, text: str) -> list[str]:
    texts = text.replace(",", " ").split()
    if wrong := [each for each in texts if not each.isdecimal()]:
        raise ConfigError(f"{key}={wrong[0]} does not fit: use whole numbers, such as 0, 1, 2.")
    return texts


def _write_prompts(folder: Path, prompts: list[str], writes: bool) -> str:
    text = "".join(f"{prompt}\n" for prompt in prompts)
    name = f"{OWN_FOLDER}/prompts/{hashlib.sha256(text.encode()).hexdigest()[:12]}.txt"
    if writes:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, text.encode())
    return name
