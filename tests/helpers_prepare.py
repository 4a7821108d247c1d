"""Small folders of clips, and what `prepare` makes of them with the tiny model."""

import csv
from pathlib import Path

from helpers_video import write_video

import mochi_tune
from mochi_tune.config.schema import DataConfig, ModelConfig, RunConfig

TINY = Path(mochi_tune.__file__).parent / "assets" / "tiny"
GEOMETRY = {"num_frames": 7, "height": 32, "width": 48}


def config_for(folder: Path, weights: Path = TINY, **data) -> RunConfig:
    data = {"videos": str(folder / "videos"), "cache": str(folder / "cache"), "allow_empty_captions": True} | data
    return RunConfig(
        device="cpu",
        model=ModelConfig(name="tiny", weights=str(weights), dtype="fp32"),
        data=DataConfig(**GEOMETRY, decode_timeout_seconds=600, **data),
    )


def add_clip(folder: Path, name: str, caption: str | None, num_frames: int = 7, **options) -> Path:
    path = folder / "videos" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return write_video(path, num_frames, **({"width": 96, "height": 72} | options))


def report_of(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "cache" / "report.csv").open(newline="") as file:
        return {record["clip"]: record for record in csv.DictReader(file)}
