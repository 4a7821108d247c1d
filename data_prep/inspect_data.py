"""`mochi-tune inspect`: writes a page of the data set as the model will see it; needs no model."""

from pathlib import Path

from tqdm import tqdm

from mochi_tune.config.load import RunConfig, weights_paths
from mochi_tune.config.sources import read_sources
from mochi_tune.data_prep.inspection import Inspection, inspect_clips
from mochi_tune.data_prep.inspection_page import make_page
from mochi_tune.data_prep.report import not_taken
from mochi_tune.errors import ConfigError, counted, printable, some
from mochi_tune.files import make_writable_folder, write_atomic
from mochi_tune.pages.html_page import write_png
from mochi_tune.weights.folder import WeightsFolder

_PAGE_NAME, _PICTURE_NAME = "inspect.html", "inspect.png"


def main(config: RunConfig, out: Path | None) -> int:
    """Writes the page and, if a browser is installed, a picture of it, and lines with their paths.

    Args:
        config: of the run.
        out: folder of both; None for `inspect` in the run folder.

    Returns:
        The exit code: 0, or 1 if `prepare` would refuse a file or a clip, or would not start.

    Raises:
        ConfigError: `out` is in a folder of videos.
        DataError: there are no videos.
        CheckpointError: the tokenizer is damaged.
        MochiTuneError: the browser failed.
    """
    if out is not None:
        _check_not_among_videos(out, [source.folder for source in read_sources(config.data)])
    out = out or Path(config.run_dir) / "inspect"
    make_writable_folder(out)
    weights = WeightsFolder(weights_paths(config))
    tokenizer = weights.load_tokenizer() if weights.has_tokenizer() else None
    found = inspect_clips(config.data, config.seed, tokenizer)
    for reason in found.refused.values():
        tqdm.write(printable(f"refused: {reason}"))
    if obstacle := "" if config.data.allow_empty_captions else _without_caption(found):
        tqdm.write(printable(obstacle))
    for line in not_taken(found.inputs):
        tqdm.write(line)
    page = make_page(found, config.name, obstacle)
    # Names of runs and folders may contain bytes that are not UTF-8.
    write_atomic(out / _PAGE_NAME, page.encode(errors="backslashreplace"), durable=True)
    tqdm.write(f"{out / _PAGE_NAME}: {counted(len(found.clips), 'clip')}, {len(found.refused)} refused")
    if write_png(out / _PAGE_NAME, out / _PICTURE_NAME):
        tqdm.write(f"picture of the page: {out / _PICTURE_NAME}")
    return 1 if found.refused or obstacle else 0


def _without_caption(found: Inspection) -> str:
    """Returns the line about the clips without a caption, "" if there are none."""
    without = [seen.clip.row.sample_id for seen in found.clips if not any(seen.clip.row.captions)]
    names = f"{counted(len(without), 'clip')} ({some(without)})"
    return f"without a caption, so that `prepare` would not start: {names}" if without else ""


def _check_not_among_videos(out: Path, folders: list[Path]) -> None:
    for folder in folders:
        if folder.resolve() in (out.resolve(), *out.resolve().parents):
            raise ConfigError(
                f"out={out} is in the folder of the videos, {folder}, where {_PICTURE_NAME} would lie among the clips: "
                "use another folder."
            )
