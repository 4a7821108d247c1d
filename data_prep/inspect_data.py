"""`mochi-tune inspect`: makes a page of the data set as the model will see it; no model is needed."""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from mochi_tune.config.load import RunConfig, weights_folder
from mochi_tune.data_prep.gather import listed
from mochi_tune.data_prep.html_page import write_png
from mochi_tune.data_prep.inspection import inspect_clips
from mochi_tune.data_prep.inspection_page import make_page
from mochi_tune.files import make_writable_folder, write_atomic
from mochi_tune.models.text_encoder import TextEncoder

PAGE_NAME, PICTURE_NAME = "inspect.html", "inspect.png"
TOKENIZER_FILES = ("tokenizer/tokenizer.json", "tokenizer/spiece.model")


def main(config: RunConfig, out: Path | None) -> int:
    """Writes the page, a picture of it where a browser is there, and a line for each that says where it is.

    Args:
        config: of the run.
        out: folder of both; None: `inspect` in the run folder.

    Returns:
        The exit code: 0, or 1 when a file or a clip was refused.

    Raises:
        DataError: no video.
        CheckpointError: the tokenizer is damaged.
        MochiTuneError: the browser fails.
    """
    out = out or Path(config.run_dir) / "inspect"
    make_writable_folder(out)
    found = inspect_clips(config.data, config.seed, load_tokenizer(weights_folder(config)))
    for reason in found.refused.values():
        tqdm.write(f"refused: {reason}")
    mute = [seen.clip.row.sample_id for seen in found.clips if not any(seen.clip.row.captions)]
    if mute and not config.data.allow_empty_captions:
        tqdm.write(f"{len(mute)} clips have no caption ({listed(mute)}), which `prepare` refuses to begin with")
    # The name of a run or a folder may hold bytes that are not UTF-8.
    write_atomic(out / PAGE_NAME, make_page(found, config.name).encode(errors="backslashreplace"), durable=True)
    tqdm.write(f"{out / PAGE_NAME}: {len(found.clips)} clips, {len(found.refused)} refused")
    if write_png(out / PAGE_NAME, out / PICTURE_NAME):
        tqdm.write(f"its picture: {out / PICTURE_NAME}")
    return 1 if found.refused else 0


def load_tokenizer(weights: Path) -> Any | None:
    """Returns the text encoder's tokenizer, or None where the weights are not there.

    Raises:
        CheckpointError: it is damaged.
    """
    if not any((weights / name).is_file() for name in TOKENIZER_FILES):
        return None
    return TextEncoder.load_tokenizer(weights)
