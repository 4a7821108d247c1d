"""Makes the folder of a published adapter, its files and its model card, and uploads it to the hub."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mochi_tune.adapters.files import Adapter, check_format
from mochi_tune.adapters.layers import kind_of
from mochi_tune.adapters.modelspec import official_base
from mochi_tune.config.values import is_repo
from mochi_tune.errors import ConfigError
from mochi_tune.files import is_elsewhere
from mochi_tune.recipes.export import ExportSummary, check_dtype, read_source, write
from mochi_tune.training.card import CURVE_FILE, DIFFUSERS_FILE, Card, card_text
from mochi_tune.training.curve import draw_losses
from mochi_tune.training.records import RunRecords, SampleVideo, find_run_dir, read_run
from mochi_tune.weights.push import upload_command

# More would hide the card behind its gallery.
MAX_VIDEOS = 8
NO_REPO = "OWNER/NAME"


@dataclass(frozen=True)
class Publication:
    """What is to be published.

    Attributes:
        adapter: file, in any format.
        formats: to write, each once.
        dtype: of the files: "fp32", "bf16" or "fp16".
        repo: owner/name on the hub; "" where none is known yet.
        about: ModelSpec's "title", "author", "license" and "trigger_phrase", in place of what the adapter states.
        adapter_alpha: of an adapter that does not state its own.
        is_private: whether a repository that an upload makes is private.
    """

    adapter: Path
    formats: tuple[str, ...] = ("diffusers",)
    dtype: str = "fp32"
    repo: str = ""
    about: Mapping[str, str] = field(default_factory=dict)
    adapter_alpha: float | None = None
    is_private: bool = True


@dataclass(frozen=True)
class PublishedFolder:
    """The folder that was made.

    Attributes:
        path: the folder.
        files: what was exported.
        notes: what the card lacks, for the user.
    """

    path: Path
    files: list[ExportSummary]
    notes: list[str]


def default_folder(adapter: Path) -> Path:
    """Returns the folder of a publication where none is named: `hub/` beside the adapter or in its run, by step."""
    source = read_source(adapter, {})
    step = source.metadata.get("step", "")
    name = f"step_{int(step):06d}" if step.isdecimal() else adapter.stem
    return (find_run_dir(adapter) or adapter.parent) / "hub" / name


def main(publication: Publication, out: Path) -> PublishedFolder:
    """Writes the new folder `out`: the adapter in each format, README.md, sample videos and the validation curve.

    Raises:
        ConfigError: a format, the dtype or the repository's name is not possible, or `out` is not new.
        CheckpointError: the adapter cannot be read, or has no place in a format or the dtype.
        OSError: the disk is full, or refuses.
    """
    for to in publication.formats:
        check_format(to)
    check_dtype(publication.dtype)
    if publication.repo and not is_repo(publication.repo):
        raise ConfigError(f"push={publication.repo} is not possible: use owner/name, of letters, digits, - _ and .")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        command = upload_command(out, publication.repo, publication.is_private) if publication.repo else ""
        upload = f" `{command}` sends what is there." if command else ""
        raise ConfigError(
            f"out={out} exists, and an export never overwrites: choose another name or remove it.{upload}"
        )
    if not out.name or out.resolve() == Path.cwd():
        raise ConfigError(f"out={out} is a folder that programs are in, and is not replaced: name a new one.")
    if is_elsewhere(out):
        raise ConfigError(f"out={out} is a link or another disk, which an export cannot replace: name a folder in it.")
    source = read_source(publication.adapter, publication.about, publication.adapter_alpha)
    run_dir, step = find_run_dir(publication.adapter), source.metadata.get("step", "")
    records = read_run(run_dir, publication.adapter, int(step)) if run_dir and step.isdecimal() else None
    # It takes its name when it is complete.
    partial = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        files = _write_files(publication, source, records, partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    notes = []
    if "modelspec.license" not in source.metadata:
        notes.append("the card states no license: give one by license=, or publish.license in `train`")
    if not publication.repo:
        notes.append(f"the card's commands say {NO_REPO}: name the repository by push= and dry_run=true")
    if records is None:
        notes.append(f"{publication.adapter} lies in no run folder, so that the card has no videos and no figures")
    elif (more := len(records.videos) - MAX_VIDEOS) > 0:
        notes.append(f"the card shows {MAX_VIDEOS} videos, {more} others are left out")
    return PublishedFolder(out, [_moved(file, out) for file in files], notes)


def _write_files(
    publication: Publication, source: Adapter, records: RunRecords | None, folder: Path
) -> list[ExportSummary]:
    """Fills the folder."""
    title = source.metadata["modelspec.title"]
    slug = _plain(title).strip("._") or "adapter"
    names = {to: DIFFUSERS_FILE if to == "diffusers" else f"{slug}_{to}.safetensors" for to in publication.formats}
    files = [write(source, to, folder / name, publication.dtype) for to, name in names.items()]
    videos = _copy_videos(records.videos[:MAX_VIDEOS], folder) if records else []
    if records and records.losses:
        (folder / CURVE_FILE).write_bytes(draw_losses(records.losses, "validation loss"))
    card = Card(
        title=title,
        repo=publication.repo or NO_REPO,
        base=official_base(source.metadata, source.layers),
        base_name=source.metadata.get("base_model", "unknown"),
        about={key: source.metadata.get(f"modelspec.{key}", "") for key in ("author", "license", "trigger_phrase")},
        adapter={
            "rank": source.metadata["rank"],
            "alpha": source.alpha,
            "layers": f"{len(source.layers)}: {', '.join(sorted({kind_of(name) for name in source.layers}))}",
            "files in": publication.dtype,
        },
        is_dora=source.is_dora,
        files=names,
        records=records,
        videos=videos,
    )
    (folder / "README.md").write_text(card_text(card), encoding="utf-8")
    return files


def _copy_videos(videos: list[SampleVideo], folder: Path) -> list[tuple[str, SampleVideo]]:
    """Copies videos to samples/ of the folder, under names that fit an address."""
    copied = []
    for number, video in enumerate(videos):
        name = f"samples/{number}_{_plain(video.file.name)}"
        (folder / "samples").mkdir(exist_ok=True)
        shutil.copyfile(video.file, folder / name)
        copied.append((name, video))
    return copied


def _plain(text: str) -> str:
    """Returns a text as a part of an address and of a command line."""
    return re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII)


def _moved(summary: ExportSummary, folder: Path) -> ExportSummary:
    return replace(summary, file=folder / summary.file.name)
