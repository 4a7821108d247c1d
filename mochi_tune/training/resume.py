"""Whether a run folder holds a run that goes on, and whether that is the run that is asked for."""

import filecmp
from pathlib import Path

from tqdm import tqdm

from mochi_tune.errors import TrainingError
from mochi_tune.training import checkpoint

# What may differ between the start of a run and its resuming: it changes what is looked at or kept, not what is learnt.
# The data's own settings are held by the cache's fingerprint.
FREE_TO_CHANGE = (
    *("name", "run_dir", "device", "model.weights", "data.", "sample.", "log.", "parallel.", "memory."),
    *("train.steps", "train.checkpoint_", "train.keep_", "train.valid", "train.sample_", "train.gradient_"),
    # Their product with the ranks that share a step is bound, as "global_batch".
    *("train.batch_size", "train.accumulation_steps"),
)


def resume_step(run_dir: Path, checkpoints: list[Path], identity: dict) -> int:
    """Returns the step to go on from, 0 for a new run, after making sure that it is the same run.

    Raises:
        TrainingError: it is another run, or one whose checkpoints are gone.
        CheckpointError: the last checkpoint is damaged.
    """
    own = run_dir / "adapter.safetensors"
    if not checkpoints:
        if own.exists():
            raise TrainingError(f"{run_dir} has an adapter and no checkpoint to go on from: use another run_dir.")
        # What a run that was killed before its first checkpoint has left is not this run's.
        for leftover in [*run_dir.glob("samples/step_*"), run_dir / "validation.jsonl"]:
            leftover.unlink(missing_ok=True)
        return 0
    checkpoint.check_checkpoint(checkpoints[-1])
    resumed = checkpoint.read_json(checkpoints[-1] / "state.json")
    check_same_run(run_dir, resumed, identity)
    newest = checkpoints[-1] / "adapter.safetensors"
    if not own.exists() or not filecmp.cmp(newest, own, shallow=False):
        # A run that was killed right after a save has not put its adapter here yet.
        checkpoint.replace_file(newest, own)
    before, now = (settings["settings"]["train.steps"] for settings in (resumed, identity))
    if resumed["step"] >= now:
        tqdm.write(f"{run_dir} is trained to step {resumed['step']} already: raise train.steps={now} to train on")
    else:
        tqdm.write(f"resuming {run_dir} from step {resumed['step']}")
        if before != now:
            tqdm.write(f"train.steps was {before}, is {now}: the learning rate's cosine is stretched to that from here")
    return resumed["step"]


def bound(settings: dict) -> list[str]:
    """Returns the settings that decide what is learnt."""
    return [key for key in settings if not key.startswith(FREE_TO_CHANGE)]


def check_same_run(run_dir: Path, resumed: dict, identity: dict) -> None:
    """Refuses to go on as another run than the one that was started.

    Raises:
        TrainingError: a setting that decides what is learnt, the cache or the base differs.
    """
    before, now = resumed["settings"], identity["settings"]
    changed = [f"{key} was {before.get(key)}, is {now[key]}" for key in bound(now) if before.get(key) != now[key]]
    changed += [f"the {part} is another one" for part in ("cache", "base") if resumed[part] != identity[part]]
    if changed:
        raise TrainingError(
            f"{run_dir} cannot go on from step {resumed['step']}: {'; '.join(changed)}: "
            "put that back, or start another run with run_dir=DIR."
        )
