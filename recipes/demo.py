"""Walks the whole road on the embedded tiny model and a real clip, by the commands that a user would type."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from mochi_tune import assets
from mochi_tune.errors import MochiTuneError
from mochi_tune.video import write_contact_sheet

PROMPT = "a big grey rabbit in front of a green hill"


def main(out: Path) -> dict[str, str]:
    """Runs prepare, train, sample (twice) and export in a new folder below `out`; returns what it made by its label."""
    folder = out / time.strftime("%Y%m%d-%H%M%S")
    videos = folder / "videos"
    videos.mkdir(parents=True)
    for source in (Path(assets.__path__[0]) / "demo").iterdir():
        shutil.copy(source, videos)
    settings = ["conf=demo", f"run_dir={folder / 'run'}", f"data.videos={videos}", f"data.cache={folder / 'cache'}"]
    adapter = folder / "run" / "adapter.safetensors"
    before, after = folder / "before.mp4", folder / "after.mp4"

    run("prepare", *settings)
    run("train", *settings)
    run("sample", *settings, f"prompt={PROMPT}", "seed=1", f"out={before}", "adapter_strength=0")
    run("sample", *settings, f"prompt={PROMPT}", "seed=1", f"out={after}")
    # The official format knows no MLP layers, which the demo trains too.
    for target in ("diffusers", "comfyui"):
        run("export", f"adapter={adapter}", f"to={target}", f"out={folder / f'adapter_{target}.safetensors'}")

    sheet = folder / "before_after.png"
    write_contact_sheet(sheet, {"before: the base": before, "after: with the LoRA": after})
    rows = (folder / "run" / "validation.jsonl").read_text().splitlines()
    first, last = (json.loads(row)["validation_loss"] for row in (rows[0], rows[-1]))
    return {
        "validation loss": f"{first:.3f} before, {last:.3f} after (random weights: the videos are noise)",
        "before": str(before),
        "after": str(after),
        "contact sheet": str(sheet),
        "adapter": str(adapter),
    }


def run(*arguments: str) -> None:
    """Runs one command as it is shown.

    Raises:
        MochiTuneError: the command failed.
    """
    tqdm.write(f"\n$ mochi-tune {shlex.join(arguments)}")
    done = subprocess.run([sys.executable, "-m", "mochi_tune.cli", *arguments], check=False)
    if done.returncode:
        raise MochiTuneError(f"the demo stopped: `mochi-tune {arguments[0]}` ended with exit code {done.returncode}.")
