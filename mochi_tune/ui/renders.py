"""What `sample` has rendered and what it is asked to render: the history of videos, and the form of new ones."""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from mochi_tune.config.explain import nearest
from mochi_tune.config.load import SAMPLE_ALIASES, load_config, quote
from mochi_tune.errors import ConfigError, DataError, MochiTuneError
from mochi_tune.files import file_sha256, parse_object, write_atomic
from mochi_tune.sampling.requests import read_requests
from mochi_tune.ui.adapters import check_adapter, number_of
from mochi_tune.ui.confs import as_text, conf_path
from mochi_tune.ui.folder import OWN_FOLDER, inside, relative
from mochi_tune.ui.runs import look_at_folder

# Where `sample` writes by itself: single videos, and the cells of grids.
PLACES = ("runs/*/samples", "runs/*/grids/*/cells")
GRIDS = "runs/*/grids/*/index.html"
SUFFIXES = (".mp4", ".webm", ".gif", ".webp", ".png")
Kind = Literal["videos", "compare", "grid"]
# In the place of an adapter: none, not even the run's own.
BASE = "base"
# Settings of a video that have a field of their own.
SIZES = ("num_frames", "height", "width", "steps")
OWN_KEYS = (
    "prompt", "prompts", "negative_prompt", "seeds", *SIZES, "adapter", "adapter_strength", "compare", "grid",
    "strengths", "checkpoints", "out",
)  # fmt: skip


@dataclass(frozen=True)
class Render:
    """A video that was rendered."""

    video: Path
    modified: float

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """What the .json beside it says, read when it is asked for; {} where that was removed meanwhile."""
        try:
            record = parse_object(self.video.with_suffix(".json").read_bytes())
        except OSError:
            return {}
        return record if record and _is_record(record) else {}


@dataclass(frozen=True)
class Grid:
    """A grid whose cells are all there: its page, which plays them, and the one video of all."""

    page: Path
    video: Path
    num_cells: int
    modified: float


@dataclass(frozen=True)
class SampleForm:
    """What somebody wants to be rendered.

    Attributes:
        prompts: one, or several, one a line.
        negative_prompt: what guidance leads away from.
        seeds: numbers, separated by blanks or commas; "" for the conf's.
        sizes: text by key of SIZES; "" leaves it as by default.
        adapters: (file, `hub:OWNER/NAME` or BASE, strength) of each; none: the run's own.
        kind: single videos, each beside the base, or a grid.
        strengths: of a grid: factors on the strengths, separated by blanks or commas.
        checkpoints: of a grid: "all", or steps of the run, separated by blanks or commas; "" for none.
        more: other settings of `sample`, `key=value`, one a line.
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
    """Returns the videos of the folder's runs that have their settings beside them, the newest first."""
    found = []
    for place in _places(folder):
        files = _files(place)
        for record in [record for name, record in files.items() if name.endswith(".json")]:
            names = (record.name.removesuffix(".json") + suffix for suffix in SUFFIXES)
            video = next((files[name] for name in names if name in files), None)
            # What was removed meanwhile, or is a link that leads out of the folder, is left out.
            with contextlib.suppress(OSError, DataError):
                if video and _belong_together(folder, record, video):
                    found.append((-video.stat().st_mtime, video.path))
    return [Render(Path(path), -modified) for modified, path in sorted(found)]


def _files(place: Path) -> dict[str, os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            return {entry.name: entry for entry in entries if entry.is_file()}
    except OSError:
        # It was removed meanwhile, or is somebody else's.
        return {}


def _belong_together(folder: Path, record: os.DirEntry[str], video: os.DirEntry[str]) -> bool:
    for link in (each for each in (record, video) if each.is_symlink()):
        inside(folder, link.path)
    facts = record.stat()
    return _has_record(record.path, facts.st_mtime_ns, facts.st_size)


def find_render(folder: Path, name: str) -> Render:
    """Returns the video of a path in the folder.

    Raises:
        DataError: it is not among those of `list_renders`, or the path leads out of the folder.
    """
    path = inside(folder, name)
    same = (each for each in list_renders(folder) if each.video.name == path.name)
    render = next((each for each in same if inside(folder, each.video) == path), None)
    if render is None or not render.record:
        raise DataError(f"{name} is gone: choose another video.")
    return render


def _places(folder: Path) -> list[Path]:
    """Returns the folders of PLACES, without those behind a link that leads out of the page's folder."""
    root = folder.resolve()
    found = [path for place in PLACES for path in folder.glob(place) if path.is_dir()]
    return [path for path in found if path.resolve().is_relative_to(root)]


@lru_cache(maxsize=2**16)
def _has_record(path: str, _modified: int, _size: int) -> bool:
    """Whether a file holds a record; each is read once, as there may be thousands, of which a page shows twelve."""
    record = parse_object(Path(path).read_bytes())
    return record is not None and _is_record(record)


def _is_record(record: Mapping[str, Any]) -> bool:
    """Whether a JSON file beside a video is what `sample` writes there, and not another program's."""
    adapters = record.get("adapters") or []
    return (
        isinstance(record.get("prompt"), str)
        and isinstance(record.get("sampler") or {}, dict)
        and isinstance(record.get("init_video") or {}, dict)
        and isinstance(adapters, list)
        and all(isinstance(each, dict) and isinstance(each.get("strength", 1), int | float) for each in adapters)
    )


def list_grids(folder: Path) -> list[Grid]:
    """Returns the finished grids of the folder's runs, the newest first."""
    found = []
    for page in folder.glob(GRIDS):
        num_cells = len(list((page.parent / "cells").glob("*.json")))
        # One that is removed meanwhile is left out.
        with contextlib.suppress(OSError):
            found.append(Grid(page, page.with_name("grid.mp4"), num_cells, page.stat().st_mtime))
    return sorted(found, key=lambda grid: -grid.modified)


def look_at_renders(folder: Path) -> list[Any]:
    """Returns what tells whether there are other videos or grids than before."""
    return [sorted((str(path), look_at_folder(path)) for path in _places(folder)), list_grids(folder)]


def run_of(folder: Path, video: Path) -> str:
    """Returns the run folder that a video of PLACES lies in, as a path in the folder."""
    return "/".join(relative(folder, video).split("/")[:2])


def facts_of(record: Mapping[str, Any]) -> str:
    """Returns what matters most of a video in one line."""
    sampler, adapters = record.get("sampler") or {}, record.get("adapters") or []
    size = f"{record.get('num_frames')} frames, {record.get('width')} x {record.get('height')}"
    parts = [f"seed {record.get('seed')}", size, f"{sampler.get('steps')} steps"]
    if record.get("side_by_side") == ["base", "adapted"]:
        parts.append("base | LoRA")
    return " · ".join(parts + ([] if adapters else ["the base"]))


def adapters_of(folder: Path, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the adapters of a video with their strengths, as the form has them."""
    found = []
    for adapter in record.get("adapters") or []:
        name, strength = str(adapter.get("file", "")), adapter.get("strength", 1)
        # A file from elsewhere keeps its name, and the form refuses it when it is started.
        with contextlib.suppress(MochiTuneError):
            name = relative(folder, inside(folder, name))
        found.append((name, as_text(int(strength) if strength == int(strength) else strength)))
    return found


def changed_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Returns the adapters and the start video of a video that hold another content than when it was made."""
    found = []
    for each in (*(record.get("adapters") or []), record.get("init_video") or {}):
        # What is gone or outside is refused when it is started.
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
    """Returns the arguments of `sample`, checked as it checks them before it reads any weight.

    Several prompts are written to a file of the page's own folder.

    Raises:
        MochiTuneError: a setting does not fit, or an adapter is not there.
    """
    prompts = [line.strip() for line in form.prompts.splitlines() if line.strip()]
    given = {"negative_prompt": form.negative_prompt.strip()} if form.negative_prompt.strip() else {}
    given |= {"seeds": f"[{', '.join(_whole_numbers('seeds', form.seeds))}]"} if form.seeds.strip() else {}
    given |= {key: text.strip() for key, text in form.sizes.items() if text.strip()}
    named = [(name, strength.strip() or "1") for name, strength in form.adapters if name and name != BASE]
    chosen = [(check_adapter(folder, name), strength) for name, strength in named]
    for _, strength in chosen:
        number_of("adapter_strength", strength)
    if not chosen and form.adapters and form.adapters[0][0] == BASE:
        given["adapter_strength"] = "0"
    if len(chosen) == 1:
        given |= {"adapter": chosen[0][0], "adapter_strength": chosen[0][1]}
    elif chosen:
        given["adapter"] = f"[{', '.join(quote(name) for name, _ in chosen)}]"
        given["adapter_strength"] = f"[{', '.join(strength for _, strength in chosen)}]"
    given |= {"compare": "base"} if form.kind == "compare" else _grid(form) if form.kind == "grid" else {}
    for key, value in _more(form.more):
        if key in given:
            raise ConfigError(f"{key} is there twice: leave it out of the other settings.")
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
        sample = config.sample
        if sample.init_video:
            inside(folder, sample.init_video)
        # A file is looked for where the verb will run, which is the folder.
        read_requests(sample, config.data, config.seed, inside(folder, config.run_dir))


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
            raise ConfigError(f"{key} has a field of its own or a place that the page chooses: leave it out here.")
        if not equals or key not in SAMPLE_ALIASES:
            raise ConfigError(f"{line} is no setting of `sample`{nearest(key, SAMPLE_ALIASES)}")
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
