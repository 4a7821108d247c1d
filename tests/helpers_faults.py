"""Runs to compare: what two run folders must have in common, and where a test takes hold of a run."""

import contextlib
import fcntl
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from helpers_process import run_program
from safetensors.torch import load_file

# Functions for a test to hold a trainer in: at the beginning of each step, of each clip that is validated, of each
# batch that is read ahead, of each step of the sampler, and of the decoding of each half of a video.
STEP = "mochi_tune.recipes.train_lora:learning_rate_at"
# Of a process that has yet to import the trainer.
STARTED_STEP = "mochi_tune.training.schedule:learning_rate_at"
VALIDATION = "mochi_tune.training.evaluate:collate"
READING = "mochi_tune.training.loader:collate"
SAMPLING = "mochi_tune.sampling.sampler:guided"
DECODING = "mochi_tune.training.evaluate:to_vae_latents"


@cache
def toy_lesson() -> list[str]:
    """Returns the settings of a cache of the demo's clips, made once a test session."""
    from mochi_tune.toy.lesson import write_lesson

    folder = Path(mkdtemp(prefix="mochi_tune_toy_"))
    write_lesson(folder / "videos", 0)
    settings = [f"data.videos={folder / 'videos'}", f"data.cache={folder / 'cache'}"]
    code, text = run_program(["prepare", "conf=toy_lora", *settings], folder / "out")
    assert code == 0, text
    return settings


def rows_of(run_dir: Path, name: str = "metrics") -> list[dict]:
    """Returns the rows of a run without its times."""
    lines = (run_dir / f"{name}.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def newest_checkpoint(run_dir: Path) -> Path:
    found = {json.loads(m.read_text())["step"]: m.parent for m in run_dir.glob("checkpoints/step_*/manifest.json")}
    return found[max(found)]


def assert_same_end(ours: Path, theirs: Path) -> None:
    """Compares all that two runs have come to, bit for bit."""
    mine, its = newest_checkpoint(ours), newest_checkpoint(theirs)
    assert mine.name == its.name
    names = sorted(path.name for path in its.glob("*.safetensors"))
    assert names == sorted(path.name for path in mine.glob("*.safetensors"))
    for name in names:
        a, b = load_file(mine / name), load_file(its / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b), name
    states = [json.loads((folder / "state.json").read_text()) for folder in (mine, its)]
    for key in ("step", "groups", "losses", "rows", "cache", "base", "draws"):
        assert states[0][key] == states[1][key], key
    for name in ("metrics", "validation"):
        assert rows_of(ours, name) == rows_of(theirs, name), name
    a, b = (load_file(folder / "adapter.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)


@contextlib.contextmanager
def lock_ray(tmp_path_factory, operation: int):
    """Holds the lock of Ray's clusters: shared by tests that may start one, exclusive for one that must find none.

    "auto" joins any cluster on the machine, so also that of a test in another worker of xdist.
    """
    with open(tmp_path_factory.getbasetemp().parent / "ray.lock", "a") as file:
        fcntl.flock(file, operation)
        yield
