"""A small road to walk: three real clips, prepared once for the tiny model, and the commands that follow."""

import json
import os
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from helpers_video import write_video

from mochi_tune.config.load import load_config
from mochi_tune.data_prep.prepare import main as prepare
from mochi_tune.recipes.train_lora import main as train_lora

# With the number of threads that conftest has chosen: bit for bit takes the same one.
ENVIRONMENT = dict(os.environ)
CAPTIONS = ("a red ball rolls slowly over the hill", "a cat", "two old birds fly away at night")
LORA = ["lora=attention_mlp", "lora.rank=2", "lora.dropout=0.1"]
SIZES = ["data.num_frames=7", "data.height=32", "data.width=48", "device=cpu", "model=tiny"]
QUIET = ["train.sample_every=0", "train.validate_every=0", "train.recompute=none"]


@cache
def prepared() -> Path:
    """Returns a folder with videos/ and a cache/ of them, made once a test session."""
    folder = Path(mkdtemp(prefix="mochi_tune_road_"))
    (folder / "videos").mkdir()
    for number, caption in enumerate(CAPTIONS):
        write_video(folder / "videos" / f"clip_{number}.mp4", 8, width=48, height=32, first_number=10 * number)
        (folder / "videos" / f"clip_{number}.txt").write_text(caption)
    paths = [f"data.videos={folder / 'videos'}", f"data.cache={folder / 'cache'}"]
    assert prepare(load_config("my_lora", [*SIZES, *paths])) == 0
    return folder


def road(run_dir: Path, *more: str) -> list[str]:
    """Returns the settings of a run over the prepared clips."""
    folder = prepared()
    return [
        *SIZES,
        *QUIET,
        f"data.videos={folder / 'videos'}",
        f"data.cache={folder / 'cache'}",
        f"sample.prompt_cache={folder / 'prompts'}",
        *more,
        f"run_dir={run_dir}",
    ]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mochi_tune.cli", *arguments]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(run_dir: Path | str, *more: str) -> int:
    """Trains in this process; returns the exit code."""
    return train_lora(load_config("my_lora", road(run_dir, *LORA, *more)))
