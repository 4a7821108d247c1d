"""The file names of eval videos. Trackers import this module, which therefore does not import torch."""

import re
from collections.abc import Sequence
from pathlib import Path

# The temporary file of a video has its own temporary file, whose name begins with two dots.
_TEMPORARY = re.compile(r"\.{1,2}step_\d{6,}_prompt_\d+\.(mp4|png|txt)\..+\.tmp")


def find_eval_videos(run_dir: Path) -> list[tuple[int, int, Path]]:
    """Returns (step, number of the prompt, file) of each eval video or picture, sorted."""
    found = []
    for path in (run_dir / "samples").glob("step_*_prompt_*.*"):
        parts = path.stem.split("_")
        if path.suffix in (".mp4", ".png") and len(parts) == 4 and parts[1].isdecimal() and parts[3].isdecimal():
            found.append((int(parts[1]), int(parts[3]), path))
    return sorted(found)


def is_written(path: Path) -> bool:
    """Whether an eval video exists; a crash of the machine may have left an empty file."""
    return path.exists() and path.stat().st_size > 0


def find_temporary_videos(run_dir: Path) -> list[Path]:
    """Returns the temporary files of eval videos and their prompts, without those of `sample` in the same folder."""
    return [path for path in (run_dir / "samples").glob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]


def prompt_file(video: Path) -> Path:
    """Returns the text file with the prompt of an eval video; a later start of the run may have other prompts."""
    return video.with_suffix(".txt")


def prompt_of(video: Path, number: int, prompts: Sequence[str]) -> str:
    """Returns the prompt of an eval video; if an older version saved none, the current prompt of this number."""
    if (path := prompt_file(video)).is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    return prompts[number] if number < len(prompts) else f"prompt {number}"
