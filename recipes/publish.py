"""Makes the folder of a published adapter: adapter files, model card, sample videos and validation curve."""

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
from mochi_tune.recipes.new_output import check_new
from mochi_tune.training.card import CURVE_FILE, DIFFUSERS_FILE, Card, card_text
from mochi_tune.training.curve import draw_losses
from mochi_tune.training.records import RunRecords, SampleVideo, find_run_dir, read_run
from mochi_tune.weights.push import upload_command

# Maximum number of sample videos; more would push the text of the card out of sight.
_MAX_VIDEOS = 8
# Placeholder in the card for a repository without a name.
_NO_REPO = "OWNER/NAME"


@dataclass(frozen=True)
class Publication:
    """What to publish.

    Attributes:
        adapter: adapter file in any format.
        formats: formats to write, each once.
        dtype: dtype of the files: "fp32", "bf16" or "fp16".
        repo: owner/name on the hub; "" if it is not known yet.
        about: ModelSpec's "title", "author", "license" and "trigger_phrase", which replace those of the adapter.
        adapter_alpha: alpha of an adapter that states none.
        is_private: whether the upload makes a new repository private.
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
    """A folder that is ready for upload.

    Attributes:
        path: the folder.
        files: the exported adapter files.
        notes: remarks for the user on what the card lacks.
    """

    path: Path
    files: list[ExportSummary]
    notes: list[str]


def default_folder(adapter: Path) -> Path:
    """Returns the default output folder: hub/step_N or hub/NAME in the run folder, or else next to the adapter."""
    source = read_source(adapter, {})
    step = source.metadata.get("step", "")
    name = f"step_{int(step):06d}" if step.isdecimal() else adapter.stem
    return (find_run_dir(adapter) or adapter.parent) / "hub" / name


def check_repo(repo: str) -> None:
    """Refuses a repository that the hub cannot have; "" is none.

    Raises:
        ConfigError: it is not owner/name.
    """
    if repo and not is_repo(repo):
        raise ConfigError(f"push={repo} is not possible: use owner/name, of letters, digits, -, . and _.")


def main(publication: Publication, out: Path) -> PublishedFolder:
    """Writes a folder with the adapter in each format, README.md, sample videos and the validation curve.

    Args:
        publication: what to publish.
        out: new or empty folder.

    Raises:
        ConfigError: a format, the dtype, the name of the repository or `out` is not possible.
        CheckpointError: the adapter cannot be read, or does not fit a format or the dtype.
        OSError: the disk is full or refuses.
    """
    for to in publication.formats:
        check_format(to)
    check_dtype(publication.dtype)
    check_repo(publication.repo)
    if not out.is_dir() or any(out.iterdir()):
        command = upload_command(out, publication.repo, publication.is_private) if publication.repo else ""
        check_new(out, f" `{command}` uploads what is there." if command else "")
    if not out.name or out.resolve() == Path.cwd():
        raise ConfigError(f"out={out} is the root or the working folder and cannot be replaced: name a new folder.")
    if is_elsewhere(out):
        raise ConfigError(f"out={out} is a link or a mount point and cannot be replaced: name a folder in it.")
    source = read_source(publication.adapter, publication.about, publication.adapter_alpha)
    run_dir, step = find_run_dir(publication.adapter), source.metadata.get("step", "")
    records = read_run(run_dir, publication.adapter, int(step)) if run_dir and step.isdecimal() else None
    # The folder is renamed to `out` once it is complete.
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
        notes.append("the card states no license: set license=, or publish.license in `train`")
    if not publication.repo:
        notes.append(f"the commands in the card say {_NO_REPO}: name the repository with push= and dry_run=true")
    if records is None:
        notes.append(f"{publication.adapter} is in no run folder, so the card has no videos and no figures")
    elif (more := len(records.videos) - _MAX_VIDEOS) > 0:
        notes.append(f"the card shows {_MAX_VIDEOS} videos and leaves out {more}")
    return PublishedFolder(out, [_moved(file, out) for file in files], notes)


def _write_files(
    publication: Publication, source: Adapter, records: RunRecords | None, folder: Path
) -> list[ExportSummary]:
    """Writes all files of the publication to an empty folder; returns summaries of the adapter files."""
    title = source.metadata["modelspec.title"]
    slug = _plain(title).strip("._") or "adapter"
    names = {to: DIFFUSERS_FILE if to == "diffusers" else f"{slug}_{to}.safetensors" for to in publication.formats}
    files = [write(source, to, folder / name, publication.dtype) for to, name in names.items()]
    videos = _copy_videos(records.videos[:_MAX_VIDEOS], folder) if records else []
    if records and records.losses:
        (folder / CURVE_FILE).write_bytes(draw_losses(records.losses, "validation loss"))
    card = Card(
        title=title,
        repo=publication.repo or _NO_REPO,
        base=official_base(source.metadata, source.layers),
        base_name=source.metadata.get("base_model", "unknown"),
        about={key: source.metadata.get(f"modelspec.{key}", "") for key in ("author", "license", "trigger_phrase")},
        adapter={
            "rank": source.metadata["rank"],
            "alpha": source.metadata["alpha"],
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
    """Copies videos to samples/ in the folder, under names that are valid in a URL; returns these names."""
    copied = []
    for number, video in enumerate(videos):
        name = f"samples/{number}_{_plain(video.file.name)}"
        (folder / "samples").mkdir(exist_ok=True)
        shutil.copyfile(video.file, folder / name)
        copied.append((name, video))
    return copied


def _plain(text: str) -> str:
    """Replaces the characters that a URL or a command line would need to escape."""
    return re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII)


def _moved(summary: ExportSummary, folder: Path) -> ExportSummary:
    return replace(summary, file=folder / summary.file.name)
