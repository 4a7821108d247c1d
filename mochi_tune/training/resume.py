"""Resuming a run: finds the checkpoint, checks that it belongs to the same run, and rewinds the run folder to it.

`run.Run.restore_and_start` then loads the checkpoint into the model and the optimizer.
"""

import datetime
import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from mochi_tune.config.explain import as_yaml
from mochi_tune.config.load import run_config_yaml
from mochi_tune.config.settings import known_keys, rename_old, resume_rule
from mochi_tune.errors import CheckpointError, TrainingError, counted, some
from mochi_tune.files import parse_object, read_json, read_json_lines, write_atomic
from mochi_tune.training import checkpoint
from mochi_tune.training.agreement import check_shared
from mochi_tune.training.eval_files import find_eval_videos, is_written
from mochi_tune.training.loader import describe_held_out
from mochi_tune.training.metrics import FILES, Metrics, cut_after
from mochi_tune.training.preflight import TrainPlan, bound_settings
from mochi_tune.training.rewind import rewind
from mochi_tune.training.run_folder import HISTORY_FILE, read_history, record_start

# File in the run folder with the clips of the last start, so that the next one can report what changed.
CLIPS_FILE = "clips.json"


@dataclass(frozen=True)
class ResumePoint:
    """Where a run starts: at a checkpoint, or at step 0.

    Attributes:
        step: the last finished step.
        folder: the checkpoint; None at step 0.
        state: the state.json of the checkpoint.
        notes: lines to print.
        changed: changes that were accepted with resume=force.
        is_named: whether the user named the checkpoint with resume_from.
        lacks_evaluation: whether all steps are finished but the evaluation of the last one is not.
        validates_on_others: whether validations measure other clips or other noise than those before the checkpoint.
    """

    step: int = 0
    folder: Path | None = None
    state: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    is_named: bool = False
    lacks_evaluation: bool = False
    validates_on_others: bool = False


@dataclass(frozen=True)
class ThisRun:
    """The run of this command, which a checkpoint is compared with.

    Attributes:
        identity: settings, cache, order of clips, base and random numbers.
        is_forced: whether to resume despite changed settings.
        environment: see `describe_environment`.
        already_forced: changes that were forced before, by step and order of the clips; they need not be forced again.
        contents: hash of each clip of the cache, see `Cache.contents`.
        has_made: whether the rows of the run up to a step have the clips of this run's order.
    """

    identity: dict
    is_forced: bool
    environment: Mapping[str, object]
    already_forced: Collection[tuple[int, list[str], object]]
    contents: Mapping[str, str]
    has_made: Callable[[int], bool]


def find_resume_point(run_dir: Path, now: ThisRun, resume_from: Path | None) -> ResumePoint:
    """Finds the checkpoint to resume from and checks that it belongs to the same run; changes nothing on the disk.

    Args:
        run_dir: the run folder.
        now: the run of this command.
        resume_from: the checkpoint that the user named; None for the newest valid one.

    Raises:
        TrainingError: the folder holds another run, or an adapter without checkpoints.
        CheckpointError: the named checkpoint is damaged or incomplete, or all checkpoints are.
    """
    folder, wrong = named_checkpoint(resume_from) if resume_from else checkpoint.newest_valid(run_dir / "checkpoints")
    if folder is None:
        if wrong:
            raise CheckpointError(
                f"{run_dir} has no checkpoint to resume from: {'; '.join(wrong)}: use another run_dir, "
                f"or remove {run_dir / 'checkpoints'} and the adapter to start again."
            )
        if (run_dir / "adapter.safetensors").exists():
            named = (read_history(run_dir) or [{}])[-1].get("resume_from")
            again = f"give resume_from={named} again, as its last start did, or " if named else ""
            raise TrainingError(
                f"{run_dir} has an adapter but no checkpoint to resume from: {again}use another run_dir."
            )
        return ResumePoint()
    state = read_json(folder / "state.json")
    needed = ("step", "settings", "cache", "base", "draws", "groups", "rows", "losses")
    if missing := [key for key in needed if key not in state]:
        raise CheckpointError(f"{folder / 'state.json'} has no {', '.join(missing)}, so the run cannot resume.")
    last = (read_history(run_dir) or [{}])[-1]
    named, from_step = last.get("resume_from"), last.get("from_step", 0)
    if resume_from is None and named and from_step > state["step"]:
        # The checkpoints after this one were of another branch, and were put aside.
        raise TrainingError(
            f"{run_dir} has no checkpoint of its last start, which went on from {named} (step {from_step}): give "
            f"resume_from={named} again, or resume_from={folder} to go on from step {state['step']}."
        )
    # Version 0.1.0 had other names, and did not store the order of the clips.
    rename_old(state["settings"], "train.")
    state.setdefault("environment", state.get("made_by", {}))
    if "order" not in state and now.has_made(state["step"]):
        state["order"] = now.identity["order"]
    try:
        changed, notes = differences(run_dir, state, now)
    except TrainingError as error:
        raise TrainingError("; ".join([*wrong, str(error)])) from None
    before = state["environment"]
    differing = [key for key, value in now.environment.items() if before.get(key, value) != value]
    if others := [f"{key} was {before.get(key)}, is {now.environment[key]}" for key in differing]:
        notes.append(f"{'; '.join(others)}: the samples and their order stay the same, but results differ in rounding")
    notes = [f"{text}: the run resumes from an older one" for text in wrong] + notes
    is_named, on_others = resume_from is not None, _validates_on_others(state, now.identity)
    return ResumePoint(state["step"], folder, state, notes, changed, is_named, validates_on_others=on_others)


def named_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """Returns the checkpoint that the user named, and an empty list of damage.

    Raises:
        CheckpointError: it is damaged, or the folder is not a checkpoint.
    """
    if not (folder / checkpoint.MANIFEST).exists():
        near = [*checkpoint.find_checkpoints(folder / "checkpoints"), *checkpoint.find_checkpoints(folder.parent)]
        there = (
            f"use one of {', '.join(map(str, near))}, or leave it out for the newest"
            if near
            else "name a folder RUN_DIR/checkpoints/step_NNNNNN"
        )
        raise CheckpointError(f"resume_from={folder} is not a checkpoint: {there}.")
    if damage := checkpoint.damage_of(folder):
        raise CheckpointError(
            f"{damage}: name another one in resume_from, or leave it out for the newest undamaged one."
        )
    return folder, []


def differences(run_dir: Path, state: dict, this: ThisRun) -> tuple[list[str], list[str]]:
    """Returns the changes that were forced, and lines to print about all changes.

    Raises:
        TrainingError: a setting that decides what is learnt has changed, and the change is not or cannot be forced.
    """
    identity = this.identity
    moved, altered = changed_clips(run_dir, state["cache"], this.contents)
    now = identity["settings"]
    # A setting that did not exist in the version of the checkpoint had the value that is the default now.
    before = {key: each.default for key, each in known_keys().items() if key in now and not each.is_required}
    before |= state["settings"]
    differing = [key for key in now if before.get(key) != now[key]]
    plain = [key for key in differing if key != "data.sources"]
    texts = {key: f"{key} was {as_yaml(before.get(key))}, is {as_yaml(now[key])}" for key in plain}
    # Of changes that are no settings: the texts, and reasons. What was forced is compared without reasons, as the clips
    # of the last start, which give one, are others after it.
    others, whys = {}, {}
    # A finished run does not need the order of clips.
    lacks_order = "order" not in state and state["step"] < now["train.steps"]
    if lacks_order:
        others["order"] = "its checkpoint is from an older version, which did not store the order of the clips"
    elif "order" in state and state["order"] != identity["order"]:
        others["order"] = f"the order of the clips differs from that of the first {state['step']} steps"
        # The clips of an earlier start than the last one are not known by name.
        is_unknown = state["cache"] != identity["cache"] and not altered
        came = moved or ("clips were added, removed or encoded again" if is_unknown else "")
        whys["order"] = ": " + _why_other_order(before.get("seed") != now["seed"], came)
    if state["base"] != identity["base"]:
        others["base"] = "the base model changed"
    if state["draws"] != identity["draws"] and before.get("seed") == now["seed"]:
        torch = state.get("environment", {}).get("torch")
        others["draws"] = f"this version of torch draws other random numbers than {torch}"
    decisive = bound_settings(differing)
    fixed = [texts[key] for key in decisive if resume_rule(key) == "held"]
    fixed += [text for part, text in others.items() if part == "base"]
    reasoned = [text + whys.get(part, "") for part, text in others.items()]
    changed, explained = ([texts[key] for key in decisive] + list(more) for more in (others.values(), reasoned))
    is_forced = this.is_forced or (state["step"], changed, identity["order"]) in this.already_forced
    if changed and (fixed or not is_forced):
        undo = "" if lacks_order and len(changed) == 1 else "undo that, or "
        force = "" if fixed else ", or use resume=force, after which the run cannot be reproduced from its settings"
        raise TrainingError(
            f"{run_dir} cannot resume from step {state['step']}: {'; '.join(fixed or explained)}: "
            f"{undo}start another run with run_dir=DIR{force}."
        )
    notes = [f"since step {state['step']} {text}" for key, text in texts.items() if not key.startswith(_UNMENTIONED)]
    notes += [f"since step {state['step']} {text}" for text in reasoned]
    if state["cache"] != identity["cache"] and "order" not in others:
        notes.append(
            f"since step {state['step']}: {altered or 'clips were encoded again'}; their order is the same, but "
            "the run cannot be reproduced from its start"
        )
    if before.get("train.steps") != now["train.steps"] and now.get("train.schedule", "cosine") != "constant":
        notes.append("from here on, the schedule of the learning rate is stretched to the new number of steps")
    return changed, notes


def _why_other_order(is_other_seed: bool, came: str) -> str:
    """Returns why the order of the clips differs; `came` says which clips came or went, "" for none."""
    reasons = ["the seed changed"] if is_other_seed else []
    reasons += [came] if came else []
    return ", ".join(reasons) or "repeats, weights, shares, held-out clips or the batch size changed"


def _validates_on_others(state: Mapping, identity: Mapping) -> bool:
    """Whether validations measure other clips or other noise than those before a checkpoint."""
    before, now = state["settings"], identity["settings"]
    settings = ("seed", "train.objective", "train.validation_clips")
    are_same_clips = state["cache"] == identity["cache"] and state.get("order") == identity["order"]
    return not are_same_clips or any(before.get(key, known_keys()[key].default) != now[key] for key in settings)


def read_clips(run_dir: Path) -> dict:
    """Returns the clips of the last start of a run; {} if the file is missing or damaged, as only notes use it."""
    path = run_dir / CLIPS_FILE
    found = parse_object(path.read_bytes()) if path.exists() else None
    return found if found is not None and isinstance(found.get("clips"), dict) else {}


def changed_clips(run_dir: Path, fingerprint: str, contents: Mapping[str, str]) -> tuple[str, str]:
    """Describes how the clips differ from those of the last start, if that used the cache with this fingerprint.

    Returns:
        A text that names new and removed clips, and a text that names clips with another caption or cut; "" for none.
    """
    kept = read_clips(run_dir)
    if kept.get("cache") != fingerprint:
        return "", ""
    before = kept["clips"]
    parts = {"new": contents.keys() - before.keys(), "removed": before.keys() - contents.keys()}
    texts = [f"{len(names)} {what} ({some(sorted(names))})" for what, names in parts.items() if names]
    altered = sorted(name for name in contents.keys() & before if contents[name] != before[name])
    return (
        ", ".join(texts),
        f"other captions or cuts of {counted(len(altered), 'clip')} ({some(altered)})" if altered else "",
    )


# Prefixes of settings whose changes are not reported, because they only say where files are and what is displayed.
_UNMENTIONED = ("run_dir", "resume", "sample.", "log.", "publish.", "data.videos", "data.cache")


def find_start(plan: TrainPlan) -> ResumePoint:
    """Finds where the run resumes; changes nothing on the disk.

    Raises:
        MochiTuneError: the run folder holds another run, or its checkpoints are damaged.
    """
    config, run_dir = plan.config, Path(plan.config.run_dir)
    # resume_from applies until the run saves a later checkpoint; then the same command resumes from the newest one.
    starts, is_followed, learnt = read_history(run_dir), False, _learnt(plan)

    def is_this(start: Mapping) -> bool:
        return _is_same(start.get("resume_from"), config.resume_from) and start.get("learnt", learnt) == learnt

    # The starts of this same command, newest first.
    since = list(itertools.takewhile(is_this, reversed(starts)))
    if config.resume_from and since:
        newest, _ = checkpoint.newest_valid(run_dir / "checkpoints")
        is_followed = newest is not None and checkpoint.step_of(newest) > since[-1]["from_step"]
    resume_from = Path(config.resume_from) if config.resume_from and not is_followed else None
    # Earlier versions recorded no order.
    order = plan.identity["order"]
    already_forced = [(row["from_step"], row["changed"], row.get("order", order)) for row in starts if "changed" in row]
    contents = plan.dataset.cache.contents()
    is_forced, has_made = config.resume == "force", functools.partial(_has_made, plan)
    now = ThisRun(plan.identity, is_forced, plan.environment, already_forced, contents, has_made)
    return find_resume_point(run_dir, now, resume_from)


def _has_made(plan: TrainPlan, step: int) -> bool:
    """Whether the rows of a run up to a step have the clips of a plan's order."""
    rows = [row for row in read_json_lines(Path(plan.config.run_dir) / "metrics.jsonl") if row.get("step", 0) <= step]
    names, draws = plan.dataset.cache.rows.column("sample_id"), plan.draws

    def clips_of(step: int) -> list[str]:
        batches = (draws.batch_number(step, number) for number in range(draws.num_micro_batches))
        return [names[clip] for batch in batches for clip in plan.order.batch(batch)]

    return len(rows) == step and all(row.get("clips") == clips_of(row["step"]) for row in rows)


def _learnt(plan: TrainPlan) -> str:
    """Returns a hash of the settings that decide what is learnt; with another hash, resume_from applies again."""
    settings, own = plan.identity["settings"], known_keys()
    # Without values that are derived from other settings, such as the number of samples per step.
    bound = json.dumps({key: settings[key] for key in bound_settings(settings) if key in own}, sort_keys=True)
    return hashlib.sha256(bound.encode()).hexdigest()[:12]


def _is_same(before: str | None, now: str | None) -> bool:
    """Whether two starts named the same checkpoint, possibly by different paths, or both named none."""
    if before is None or now is None:
        return before is now
    return Path(before).resolve() == Path(now).resolve()


def resume(plan: TrainPlan) -> ResumePoint:
    """Finds where the run resumes, reports it, and rewinds the run folder to there; the main process calls it."""
    config, run_dir = plan.config, Path(plan.config.run_dir)
    start = find_start(plan)
    rewind(run_dir, start, tqdm.write)
    if config.resume_from and not start.is_named:
        tqdm.write(f"resume_from={config.resume_from} was used before: the run resumes from its newest checkpoint")
    lacks = lacks_evaluation(plan, start.step)
    if lacks:
        tqdm.write(f"{run_dir} is trained to step {start.step}; its last step is not evaluated yet, and is now")
        if start.is_named:
            record_in_folder(plan, start)
        return replace(start, lacks_evaluation=True)
    if start.step >= config.train.steps:
        which = " with this resume_from" if start.is_named else ""
        more = f"set train.steps above {start.step}{which} to continue"
        tqdm.write(f"{run_dir} is already trained to step {start.step}: {more}")
        _, altered = changed_clips(run_dir, start.state["cache"], plan.dataset.cache.contents())
        if altered and start.state["cache"] != plan.identity["cache"]:
            tqdm.write(f"since then {altered}: raise train.steps to continue with them, or start another run")
        if start.is_named:
            # No step is left, so `Metrics` does not remove the rows of the steps that the user gave up.
            for name in FILES:
                cut_after(run_dir / f"{name}.jsonl", start.step, start.state["rows"].get(name, 1))
            record_in_folder(plan, start)
        return start
    for note in start.notes:
        tqdm.write(note)
    if start.folder is not None:
        tqdm.write(f"resuming {run_dir} from step {start.step}")
    if plan.config.train.validate_every and plan.validation_clips:
        tqdm.write(describe_held_out(len(plan.held_out), len(plan.validation_clips), len(plan.dataset)))
    record_in_folder(plan, start)
    return start


def check_folder_is_shared(plan: TrainPlan, start: ResumePoint) -> None:
    """Checks that all machines have the same run folder and the same checkpoint; every process calls this.

    Raises:
        ParallelError: a machine has another one; the error names it.
    """
    if plan.layout.num_ranks > 1:
        of_start = [] if start.folder is None else [start.folder / checkpoint.MANIFEST]
        # The main process has just added this start to the history. A network disk may show that a minute later.
        files = [Path(plan.config.run_dir) / HISTORY_FILE, *of_start]
        check_shared(files, 0.1 * plan.config.parallel.timeout_seconds)


def record_in_folder(plan: TrainPlan, start: ResumePoint) -> None:
    """Writes the settings, the clips and a row of the history of this start into the run folder."""
    config, run_dir = plan.config, Path(plan.config.run_dir)
    write_atomic(run_dir / "config.yaml", run_config_yaml(config).encode(), durable=True)
    rows = plan.dataset.cache.rows
    clips = {"cache": plan.identity["cache"], "clips": plan.dataset.cache.contents(), "held_out": len(plan.held_out)}
    clips["buckets"] = Counter(str(row.bucket) for row in rows)
    write_atomic(run_dir / CLIPS_FILE, json.dumps(clips).encode(), durable=True)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    facts = {"date": date, "from_step": start.step, "resume_from": config.resume_from, "changed": start.changed}
    facts |= {"notes": start.notes, "learnt": _learnt(plan), "order": plan.identity["order"]}
    record_start(run_dir, {**facts, **plan.environment})


def lacks_evaluation(plan: TrainPlan, step: int) -> bool:
    """Whether a run finished its last step but was interrupted before the evaluation of that step was complete."""
    run_dir, train = Path(plan.config.run_dir), plan.config.train
    if step != train.steps:
        return False
    rows = read_json_lines(run_dir / "validation.jsonl")
    if train.validate_every and plan.validation_clips and step not in {row.get("step") for row in rows}:
        return True
    rendered = [number for at, number, path in find_eval_videos(run_dir) if at == step and is_written(path)]
    return plan.renders_videos and len(rendered) < len(train.sample_prompts)


def check_rows(metrics: Metrics, start: ResumePoint) -> None:
    """Prints a line for each file whose rows were removed or added since the checkpoint was saved."""
    for name, found in metrics.num_rows().items():
        saved = start.state.get("rows", {}).get(name, 0)
        # The checkpoint's own step may be validated after the checkpoint is saved.
        if found < saved or (name == "metrics" and found > saved):
            tqdm.write(f"{metrics.paths[name]} has {found} rows up to step {start.step}, but had {saved}")
