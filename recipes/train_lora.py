"""Trains a LoRA on a prepared cache: the whole run, from top to bottom. The same command resumes a stopped run."""

import contextlib
import faulthandler
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mochi_tune.adapters import Adapter
from mochi_tune.config import RunConfig, config_yaml, flat_settings, sample_size, sampler_settings, weights_folder
from mochi_tune.data.cache import open_cache
from mochi_tune.data.dataset import LatentDataset
from mochi_tune.errors import ConfigError, DataError
from mochi_tune.files import make_writable_folder
from mochi_tune.lora import apply_lora, linear_shapes, lora_parameters, select_layers
from mochi_tune.models.device import DTYPES, find_device, free_memory
from mochi_tune.models.text_encoder import TextEncoder
from mochi_tune.parallel.context import apply_context_parallel
from mochi_tune.parallel.memory import apply_activation_checkpointing
from mochi_tune.parallel.mesh import Layout, Mesh, training_layout
from mochi_tune.parallel.ranks import from_first, gathered, is_first, num_ranks, wait_for_all
from mochi_tune.sampler import draw_noise
from mochi_tune.training import checkpoint
from mochi_tune.training.average import Average
from mochi_tune.training.batches import Clips, Draws, Feed
from mochi_tune.training.engine import build_engine
from mochi_tune.training.eval_videos import EvalVideos
from mochi_tune.training.guards import SpikeGuard
from mochi_tune.training.lock import RunLock
from mochi_tune.training.metrics import Metrics
from mochi_tune.training.optim import build_optimizer, check_installed
from mochi_tune.training.resume import Start, bound, find_start, take_back
from mochi_tune.training.rng import draws_proof, key_seed
from mochi_tune.training.run import Run, merged
from mochi_tune.training.saves import Saves, adapter_of, made_by, record_start, try_room
from mochi_tune.training.schedule import learning_rate_at
from mochi_tune.training.signals import Attention, Interrupted, Signals
from mochi_tune.training.trackers import Trackers, check_trackers
from mochi_tune.training.validation import held_out, validation_losses
from mochi_tune.weights import base_identity, check_weights, fingerprint, has_part, load_decoder, load_dit, meta_dit


@dataclass(frozen=True)
class Job:
    """What is to be trained, checked as far as it can be before a weight is read.

    Attributes:
        folder: of the weights.
        dataset: of all clips.
        validation: numbers of the clips that are validated on, and not trained on if `is_held_out`.
        is_held_out: whether there are enough clips to hold some out.
        layers: that get an adapter.
        draws: how samples are drawn.
        identity: what makes a run this run.
        layout: how the ranks share a step.
    """

    folder: Path
    dataset: LatentDataset
    validation: list[int]
    is_held_out: bool
    layers: list[str]
    draws: Draws
    identity: dict
    layout: Layout


def main(config: RunConfig) -> int:
    """Runs or resumes a training, as one process or one of several.

    Returns the exit code: 0, or 128 + the signal that stopped it; 2 on the ranks that another one speaks for.
    """
    job, device = check(config, num_ranks()), find_device(config.device)
    run_dir = Path(config.run_dir)
    make_writable_folder(run_dir / "samples")
    mesh = Mesh(job.layout, device, config.parallel.timeout_seconds) if num_ranks() > 1 else None
    with RunLock(run_dir) if is_first() else contextlib.nullcontext():
        return train_locked(config, job, device, mesh)


def check(config: RunConfig, num_processes: int) -> Job:
    """Checks everything that can be refused before a weight is read; seconds.

    Raises:
        MochiTuneError: of any kind, in one line.
    """
    folder = weights_folder(config)
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
    layers = select_layers(linear_shapes(skeleton), config.lora.targets)
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
    identity = {"settings": settings, "cache": cache.fingerprint, "base": base, "draws": draws_proof(config.seed)}
    held = held_out([row.path for row in cache.rows], train.validation_clips, config.seed)
    validation = held or list(range(min(train.validation_clips, len(dataset))))
    return Job(folder, dataset, validation, bool(held), layers, draws, identity, layout)


def train_locked(config: RunConfig, job: Job, device: torch.device, mesh: Mesh | None) -> int:
    """Loads, trains and saves in a run folder that is ours alone."""
    # Only the first rank writes; the others learn from it where the run stands.
    start = from_first(begin(config, job, device) if is_first() else None)
    if start.step >= config.train.steps:
        return 0
    with contextlib.ExitStack() as stack:
        metrics = trackers = None
        if is_first():
            run_dir, log = Path(config.run_dir), config.log
            metrics = stack.enter_context(Metrics(run_dir, start.step))
            check_rows(metrics, start)
            # They follow the files of the metrics, and leave before these are closed.
            trackers = stack.enter_context(
                Trackers(
                    run_dir, start.step, config.name, job.identity["settings"], wandb=log.wandb,
                    tensorboard=log.tensorboard, trackio=log.trackio, project=log.project,
                )
            )  # fmt: skip
        # One large model at a time: T5 leaves before the DiT comes.
        features = encode_prompts(config, job.folder, device)
        run = build_run(config, job, device, mesh, start, metrics)
        return train(config, job, device, run, features, trackers)


def build_run(
    config: RunConfig, job: Job, device: torch.device, mesh: Mesh | None, start: Start, metrics: Metrics | None
) -> Run:
    """Loads the model, adds the adapter and the optimizer, and puts all of it where the run stands."""
    train, run_dir, dtype = config.train, Path(config.run_dir), DTYPES[config.model.dtype]
    dit = load_dit(job.folder, device, dtype)
    seed = key_seed(config.seed, "adapter")
    apply_lora(dit, job.layers, config.lora.rank, config.lora.alpha, config.lora.dropout, seed)
    if train.gradient_checkpointing:
        apply_activation_checkpointing(dit)
    if job.layout.context > 1:
        apply_context_parallel(dit, mesh.context_group)
    parameters, num_blocks = lora_parameters(dit), len(dit.blocks)
    optimizer = build_optimizer(
        train.optimizer, parameters, train.learning_rate, train.weight_decay, train.learning_rate_b_ratio, device.type
    )
    num_bytes = 4 * sum(parameter.numel() for parameter in parameters.values())
    engine = build_engine(
        config.parallel.strategy, dit, parameters, optimizer, train.accumulation_steps, train.max_grad_norm
    )
    average = Average(engine.weights(), train.ema_decay) if train.ema_decay else None
    numbers = list(range(0 if mesh is None else mesh.data_rank, job.draws.num_micro_batches, job.layout.data))
    taught = [i for i in range(len(job.dataset)) if not job.is_held_out or i not in job.validation]
    clips = Clips(job.dataset, taught, config.data.damaged == "strict", tqdm.write)
    if start.folder is not None:
        adapter = checkpoint.load_tensors(start.folder / "adapter.safetensors")
        state = checkpoint.load_optimizer(start.folder / "optimizer.safetensors")
        engine.load(
            adapter, state, start.state["groups"],
            lambda: job.draws.loss(engine.dit, clips.batch(job.draws, 1, numbers[0]), device),
        )  # fmt: skip
        if average is not None:
            average.load(checkpoint.load_tensors(start.folder / "averaged.safetensors"))
    saves = None
    if metrics is not None:
        try_room(run_dir, num_bytes * (4 if average is not None else 3))
        saves = Saves(run_dir, metrics, train.keep_checkpoints, train.keep_every, train.keep_best, tqdm.write)
    guard = SpikeGuard(train.spike_policy, train.spike_factor, list(start.state.get("losses", ())))

    def adapter_at(tensors: Mapping[str, Tensor], step: int) -> Adapter:
        return adapter_of(tensors, adapter_metadata(config, job.identity, num_blocks, step), config.lora.alpha)

    identity = {**job.identity, "made_by": made_by(config.parallel.strategy, device)}
    step = start.step
    return Run(engine, clips, numbers, average, guard, step, step, metrics, saves, adapter_at, identity)


def train(
    config: RunConfig, job: Job, device: torch.device, run: Run, features: list[Tensor], trackers: Trackers | None
) -> int:
    """Trains to the last step, or until it is asked to stop; returns the exit code."""
    settings, draws, engine, run_dir = config.train, job.draws, run.engine, Path(config.run_dir)
    places = ((step, n) for step in range(run.done + 1, settings.steps + 1) for n in run.numbers)
    feed = Feed(lambda step, number: run.clips.batch(draws, step, number), places)
    bar = tqdm(total=settings.steps, initial=run.done, desc="train", unit="step", disable=not is_first())
    watchdog = 0.9 * config.parallel.timeout_seconds if num_ranks() > 1 else 0
    stopped_by = 0
    engine.dit.train()
    with Signals() as signals, feed, bar as progress:
        attention = Attention(signals, gathered, run.save, watchdog)
        videos = EvalVideos(
            run_dir / "samples", features, draw_noise(config.seed, *sample_size(config)), sampler_settings(config),
            lambda: load_decoder(job.folder, device, DTYPES[config.model.dtype]),
            attention, lambda: signals.received > 0,
        )  # fmt: skip
        try:
            # At step 0, or at the step that a stopped run had saved and not looked at yet.
            look(config, job, device, run, videos, attention)
            while run.done < settings.steps:
                step, started = run.done + 1, time.perf_counter()
                learning_rate = learning_rate_at(
                    step, settings.learning_rate, settings.warmup_steps, settings.steps, settings.schedule,
                    settings.decay_share,
                )  # fmt: skip
                engine.set_learning_rate(learning_rate)
                losses, mine = [], {}
                for number in run.numbers:
                    # Alone, a process need not wait for a disk when it is asked to stop.
                    batch = feed.get(gives_up=lambda: signals.received > 0 and num_ranks() == 1)
                    if batch is None:
                        engine.discard()
                        raise Interrupted
                    loss = draws.loss(engine.dit, batch, device)
                    engine.backward(loss, is_last=number == run.numbers[-1])
                    losses.append(loss.detach())
                    mine[number] = batch.clips, batch.sigma.tolist()
                # The one wait for the device in a step, and for the other ranks.
                *values, grad_norm = torch.stack([*losses, engine.gradient_norm()]).tolist()
                mine = {number: (value, *mine[number]) for number, value in zip(run.numbers, values, strict=True)}
                stopped_by, asks_to_save, everyones = attention.agreed(mine)
                loss, clips, sigmas = merged(everyones)
                row = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": learning_rate}
                drawn = {"clips": clips, "sigmas": sigmas}
                verdict = run.verdict(loss, grad_norm)
                if verdict in ("not finite", "stop"):
                    facts = {**row, **drawn, "seed": config.seed, "draws": asdict(draws)}
                    run.refuse_step(verdict, facts, run_dir, config_yaml(config))
                    return 2
                run.end_step(loss, verdict)

                seconds = round(time.perf_counter() - started, 4)
                if run.metrics is not None:
                    run.metrics.log(row | {"seconds": seconds} | ({"spike": verdict} if verdict else {}) | drawn)
                    trackers.check()
                if verdict:
                    progress.write(f"step {step}: a loss of {loss:.4f}, far above the usual: {verdict}")
                told = f"loss {loss:.4f}, norm {grad_norm:.3f}, lr {learning_rate:.1e}, {seconds:.2f} s/step"
                progress.set_postfix_str(told, refresh=False)
                progress.update()
                # Saved before it is looked at: a look takes long, and may be what fails.
                if stopped_by or asks_to_save or is_due(step, settings.checkpoint_every, settings.steps):
                    run.save()
                if stopped_by and run.done < settings.steps:
                    raise Interrupted
                look(config, job, device, run, videos, attention)
        except Interrupted:
            stopped_by = max(gathered(signals.received))
            run.save()
        finally:
            faulthandler.cancel_dump_traceback_later()
    wait_for_all()
    is_stopped = run.done < settings.steps
    if run.saves is not None:
        run.saves.check_saved(run.done)
        stopped = f"stopped after step {run.done} of {settings.steps}"
        tqdm.write(stopped if is_stopped else f"adapter: {run_dir / 'adapter.safetensors'}")
    return 128 + stopped_by if is_stopped else 0


def look(config: RunConfig, job: Job, device: torch.device, run: Run, videos: EvalVideos, attention: Attention) -> None:
    """Validates and renders, all ranks together, where this step asks for it and it was not done before a stop.

    Raises:
        Interrupted: the run was asked to stop.
    """
    train = config.train
    validates = train.validate_every and job.validation and is_due(run.done, train.validate_every, train.steps)
    validates = validates and from_first(run.metrics and not run.metrics.is_validated(run.done))
    renders_now = renders(config) and is_due(run.done, train.sample_every, train.steps)
    if not validates and not renders_now:
        return
    dit = run.engine.dit
    with run.engine.showing(run.shown()):
        if validates:
            losses = validation_losses(
                dit, job.dataset, job.validation, config.seed, train.objective, device, attention
            )
            if run.metrics is not None:
                row = {"step": run.done, "validation_loss": sum(losses.values()) / len(losses), "bins": losses}
                row |= {"held_out": job.is_held_out, "sigmas_drawn": run.metrics.sigma_histogram()}
                run.metrics.log_validation(row)
        if renders_now:
            videos.render(dit, run.done, starts_as_base=True)
    attention()


def starting_point(config: RunConfig, job: Job, device: torch.device) -> Start:
    """Finds where the run goes on; changes nothing.

    Raises:
        MochiTuneError: the run folder holds another run, or its checkpoints are damaged.
    """
    resume_from = Path(config.resume_from) if config.resume_from else None
    now = made_by(config.parallel.strategy, device)
    return find_start(Path(config.run_dir), job.identity, config.resume, resume_from, now)


def begin(config: RunConfig, job: Job, device: torch.device) -> Start:
    """Finds where the run goes on, tells of it and makes the run folder what it was there; for the first rank."""
    run_dir = Path(config.run_dir)
    now, start = made_by(config.parallel.strategy, device), starting_point(config, job, device)
    for note in start.notes:
        tqdm.write(note)
    take_back(run_dir, start, tqdm.write)
    if start.step >= config.train.steps:
        more = f"raise train.steps={config.train.steps} to train on"
        tqdm.write(f"{run_dir} is trained to step {start.step} already: {more}")
        return start
    if start.folder is not None:
        tqdm.write(f"resuming {run_dir} from step {start.step}")
    if not job.is_held_out and job.validation and config.train.validate_every:
        tqdm.write(f"{len(job.dataset)} clips are too few to hold any out: validation is on clips that are trained on")
    (run_dir / "config.yaml").write_text(config_yaml(config))
    record_start(run_dir, {"from_step": start.step, "changed": start.changed, **now})
    return start


def check_rows(metrics: Metrics, start: Start) -> None:
    """Tells of rows that a checkpoint vouches for and that somebody has taken away or added."""
    found, saved = metrics.num_rows()["metrics"], start.state.get("rows", {}).get("metrics", 0)
    if found != saved:
        tqdm.write(f"{metrics.paths['metrics']} has {found} rows up to step {start.step}, and had {saved}")


def is_due(step: int, every: int, num_steps: int) -> bool:
    """Whether something that is done every so many steps, and at the last one, is done at this one; 0 is never."""
    return step == num_steps or (every > 0 and step % every == 0)


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


def encode_prompts(config: RunConfig, folder: Path, device: torch.device) -> list[Tensor]:
    """Returns the features of the eval prompts and, last, of the negative prompt; nothing where none is rendered."""
    if not renders(config):
        return []
    encoder = TextEncoder.load(folder, device, torch.float32)
    prompts = [*config.train.sample_prompts, config.sample.negative_prompt]
    features = [features.cpu() for features in encoder.encode(prompts)]
    del encoder
    free_memory()
    return features


def adapter_metadata(config: RunConfig, identity: dict, num_blocks: int, step: int) -> dict[str, str]:
    """Returns what a file must tell of itself: which base, which adapter, how far trained, by which settings."""
    learnt = {key: identity["settings"][key] for key in bound(identity["settings"])}
    settings = json.dumps(learnt, sort_keys=True)
    return {
        "base_model": config.model.name,
        "base_fingerprint": identity["base"],
        "num_blocks": str(num_blocks),
        "rank": str(config.lora.rank),
        "alpha": str(config.lora.alpha),
        "targets": json.dumps(list(config.lora.targets)),
        "step": str(step),
        "config_hash": hashlib.sha256(settings.encode()).hexdigest(),
        "name": config.name,
    }
