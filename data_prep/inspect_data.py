"""`mochi-tune inspect`: makes a page of the data set as the model will see it; no model is needed."""

from pathlib import Path

from tqdm import tqdm

from mochi_tune.config.load import RunConfig, weights_paths
from mochi_tune.data_prep.inspection import inspect_clips
from mochi_tune.data_prep.inspection_page import make_page
from mochi_tune.data_prep.report import not_taken
from mochi_tune.errors import counted, printable, some
from mochi_tune.files import make_writable_folder, write_atomic
from mochi_tune.pages.html_page import write_png
from mochi_tune.weights.folder import WeightsFolder

PAGE_NAME, PICTURE_NAME = "inspect.html", "inspect.png"


def main(config: RunConfig, out: Path | None) -> int:
    """Writes the page, a picture of it where a browser is there, and a line for each that says where it is.

    Args:
        config: of the run.
        out: folder of both; None: `inspect` in the run folder.

    Returns:
        The exit code: 0, or 1 when `prepare` would refuse a file or a clip, or refuse to begin.

    Raises:
        DataError: no video.
        CheckpointError: the tokenizer is damaged.
        MochiTuneError: the browser fails.
    """
    out = out or Path(config.run_dir) / "inspect"
    make_writable_folder(out)
    weights = WeightsFolder(weights_paths(config))
    tokenizer = weights.load_tokenizer() if weights.has_tokenizer() else None
    found = inspect_clips(config.data, config.seed, tokenizer)
    for reason in found.refused.values():
        tqdm.write(printable(f"refused: {reason}"))
    is_mute_refused = not config.data.allow_empty_captions
    mute = [seen.clip.row.sample_id for seen in found.clips if is_mute_refused and not any(seen.clip.row.captions)]
    if mute:
        names = printable(f"{counted(len(mute), 'clip')} ({some(mute)})")
        tqdm.write(f"without a caption, which `prepare` refuses to begin with: {names}")
    for line in not_taken(found.inputs):
        tqdm.write(line)
    # The name of a run or a folder may hold bytes that are not UTF-8.
    write_atomic(out / PAGE_NAME, make_page(found, config.name).encode(errors="backslashreplace"), durable=True)
    tqdm.write(f"{out / PAGE_NAME}: {counted(len(found.clips), 'clip')}, {len(found.refused)} refused")
    if write_png(out / PAGE_NAME, out / PICTURE_NAME):
        tqdm.write(f"its picture: {out / PICTURE_NAME}")
    return 1 if found.refused or mute else 0
