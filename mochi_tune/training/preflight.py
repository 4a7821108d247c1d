"""What a training is asked to do, checked as far as it can be before a weight is read, and where it goes on."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mochi_tune.adapters.files import Adapter, check_adapter, load_adapter
from mochi_tune.adapters.lora import LayerSettings, check_start, linear_shapes
from mochi_tune.config.load import config_yaml, weights_folder
from mochi_tune.config.lora import lora_settings
from mochi_tune.config.schema import RunConfig
from mochi_tune.config.settings import flat_settings
from mochi_tune.data.cache import open_cache
from mochi_tune.data.dataset import LatentDataset
from mochi_tune.errors import ConfigError, DataError
from mochi_tune.parallel.mesh import Layout, training_layout
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.training.checkpoint import find_checkpoints
from mochi_tune.training.draws import draws_proof
from mochi_tune.training.loader import Draws
from mochi_tune.training.metrics import Metrics
from mochi_tune.training.optim import check_installed
from mochi_tune.training.run_folder import Start, bound, find_start, take_back
from mochi_tune.training.saves import history, made_by, record_start
from mochi_tune.training.trackers import check_trackers
from mochi_tune.training.validation import held_out
from mochi_tune.weights.load import base_identity, check_weights, fingerprint, has_part, meta_dit


@dataclass(frozen=True)
class Job:
    """What is to be trained, checked as far as it can be before a weight is read.

    Attributes:
        folder: of the weights.
        dataset: of all clips.
        validation: numbers of the clips that are validated on, and not trained on if `is_held_out`.
        is_held_out: whether there are enough clips to hold some out.
        layers: that get an adapter, and how large a one.
        begins_with: the adapter that a new run begins with, if that is not a fresh one.
        draws: how samples are drawn.
        identity: what makes a run this run.
        layout: how the ranks share a step.
    """

    folder: Path
    dataset: LatentDataset
    validation: list[int]
    is_held_out: bool
    layers: dict[str, LayerSettings]
    begins_with: Adapter | None
    draws: Draws
    identity: dict
    layout: Layout


def check(config: RunConfig, num_processes: int) -> Job:
    """Checks everything that can be refused before a weight is read; seconds.

    Raises:
        MochiTuneError: of any kind, in one line.
    """
    folder = weights_folder(config)
    sampler_settings(config.sample)
    check_weights(folder, ["dit", "decoder", "text_encoder"] if renders(config) else ["dit"])
    data, train = config.data, config.train
    # The encoders need not lie where the training runs; where they do, the cache must be theirs.
    vae, t5 = (fingerprint(folder, part) if has_part(folder, part) else None for part in ("encoder", "text_encoder"))
    size = {"num_frames": data.num_frames, "height": data.height, "width": data.width}
    cache = open_cache(Path(data.cache), **size, vae_fingerprint=vae, t5_fingerprint=t5)
    dataset, skeleton = LatentDataset(cache), meta_dit(folder)
    check_text_width(dataset, skeleton.config.t5_feat_dim)
    check_installed(train.optimizer)
    check_trackers(wandb=config.log.wandb, tensorboard=config.log.tensorboard, trackio=config.log.trackio)
    shapes = linear_shapes(skeleton)
    layers = lora_settings(config.lora, shapes)
    if config.parallel.strategy != "data" and num_processes == 1:
        raise ConfigError(
            f"parallel.strategy={config.parallel.strategy} shares a run among processes, and there is one: "
            "use parallel.num_processes=2 or more, or parallel=single."
        )
    layout = training_layout(num_processes, skeleton.config.num_heads, config.parallel.context or 1)
    draws = Draws(
        config.seed, train.batch_size, train.accumulation_steps * layout.data, train.objective, train.caption_dropout,
        train.sigma_distribution, train.sigma_mean, train.sigma_std, train.sigma_shift, train.sigma_stratified,
        train.loss_weighting,
    )  # fmt: skip
    settings = flat_settings(config)
    # What is learnt depends on how many samples make a step, not on who computes them.
    settings["global_batch"] = train.batch_size * draws.num_micro_batches
    base = base_identity(folder)
    begins_with = None
    if config.lora.init_from is not None and not find_checkpoints(Path(config.run_dir) / "checkpoints"):
        begins_with = load_adapter(Path(config.lora.init_from).expanduser())
        check_adapter(begins_with, shapes, base)
        check_start(begins_with.layers, layers, config.lora.dora, str(begins_with))
    count = train.validation_clips if train.validate_every else 0
    held = held_out([row.path for row in cache.rows], count, config.seed)
    settings["held_out"] = len(held)
    identity = {"settings": settings, "cache": cache.fingerprint, "base": base, "draws": draws_proof(config.seed)}
    validation = held or list(range(min(train.validation_clips, len(dataset))))
    return Job(folder, dataset, validation, bool(held), layers, begins_with, draws, identity, layout)


def starting_point(config: RunConfig, job: Job, device: torch.device) -> Start:
    """Finds where the run goes on; changes nothing.

    Raises:
        MochiTuneError: the run folder holds another run, or its checkpoints are damaged.
    """
    # Followed once: the same command then goes on from what has come of it.
    starts = history(Path(config.run_dir))
    is_followed = bool(starts) and config.resume_from == starts[-1].get("resume_from")
    resume_from = Path(config.resume_from) if config.resume_from and not is_followed else None
    now = made_by(config.parallel.strategy, device)
    agreed = [(start.get("from_step"), start.get("changed")) for start in starts]
    return find_start(Path(config.run_dir), job.identity, config.resume, resume_from, now, agreed)


def begin(config: RunConfig, job: Job, device: torch.device) -> Start:
    """Finds where the run goes on, tells of it and makes the run folder what it was there; for the first rank."""
    run_dir = Path(config.run_dir)
    now, start = made_by(config.parallel.strategy, device), starting_point(config, job, device)
    take_back(run_dir, start, tqdm.write)
    if start.step >= config.train.steps:
        more = f"raise train.steps={config.train.steps} to train on"
        tqdm.write(f"{run_dir} is trained to step {start.step} already: {more}")
        return start
    for note in start.notes:
        tqdm.write(note)
    if start.folder is not None:
        tqdm.write(f"resuming {run_dir} from step {start.step}")
    if not job.is_held_out and job.validation and config.train.validate_every:
        tqdm.write(f"{len(job.dataset)} clips are too few to hold any out: validation is on clips that are trained on")
    elif job.is_held_out:
        tqdm.write(f"{len(job.validation)} of {len(job.dataset)} clips are held out for validation")
    (run_dir / "config.yaml").write_text(config_yaml(config))
    facts = {"from_step": start.step, "resume_from": config.resume_from, "changed": start.changed}
    record_start(run_dir, {**facts, **now})
    return start


def check_rows(metrics: Metrics, start: Start) -> None:
    """Tells of rows that a checkpoint vouches for and that somebody has taken away or added."""
    found, saved = metrics.num_rows()["metrics"], start.state.get("rows", {}).get("metrics", 0)
    if found != saved:
        tqdm.write(f"{metrics.paths['metrics']} has {found} rows up to step {start.step}, and had {saved}")


def check_text_width(dataset: LatentDataset, width: int) -> None:
    """Refuses a cache whose text features are those of another T5 than the DiT's.

    Raises:
        DataError: their width is not the DiT's.
    """
    found = dataset.cache.text_width()
    if found != width:
        raise DataError(
            f"the cache {dataset.cache.folder} has text features of width {found}, the DiT takes {width}: "
            "run `mochi-tune prepare` with this model, or name another folder in data.cache."
        )


def renders(config: RunConfig) -> bool:
    """Whether the run renders eval videos."""
    return bool(config.train.sample_every and config.train.sample_prompts)


def adapter_metadata(config: RunConfig, identity: dict, num_blocks: int, step: int) -> dict[str, str]:
    """Returns what a file must tell of itself: which base, which adapter, how far trained, by which settings."""
    learnt = {key: identity["settings"][key] for key in bound(identity["settings"])}
    settings = json.dumps(learnt, sort_keys=True)
    return {
        "base_model": config.model.name,
        "base_fingerprint": identity["base"],
        "num_blocks": str(num_blocks),
        "targets": json.dumps(list(config.lora.targets)),
        "step": str(step),
        "config_hash": hashlib.sha256(settings.encode()).hexdigest(),
        "name": config.name,
    }
