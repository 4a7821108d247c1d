"""The files of eval videos, by their names; a module of its own as trackers read them without torch."""

from pathlib import Path


def find_eval_videos(run_dir: Path) -> list[tuple[int, int, Path]]:
    """Returns the step, the number of the prompt, and the file of each eval video or picture, in this order."""
    found = []
    for path in (run_dir / "samples").glob("step_*_prompt_*.*"):
        parts = path.stem.split("_")
        if path.suffix in (".mp4", ".png") and len(parts) == 4 and parts[1].isdecimal() and parts[3].isdecimal():
            found.append((int(parts[1]), int(parts[3]), path))
    return sorted(found)
