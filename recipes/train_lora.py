"""Trains a LoRA on a prepared cache: the whole run, from top to bottom. The same command resumes a stopped run."""

import contextlib
import faulthandler
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mochi_tune.adapters.files import Adapter
from mochi_tune.adapters.lora import (
    apply_lora,
    lora_parameters,
    settings_metadata,
    start_from,
    trained_layers,
)
from mochi_tune.config.load import RunConfig, config_yaml
from mochi_tune.config.schema import sample_size
from mochi_tune.errors import ParallelError
from mochi_tune.files import make_writable_folder
from mochi_tune.models.device import DTYPES, find_device, free_memory
from mochi_tune.models.text_encoder import TextEncoder
from mochi_tune.parallel.context import apply_context_parallel
from mochi_tune.parallel.memory import apply_activation_checkpointing
from mochi_tune.parallel.mesh import Mesh
from mochi_tune.parallel.processes import from_first, gathered, is_first, num_ranks, wait_for_all
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.sampling.sampler import draw_noise
from mochi_tune.training.accelerator import DataParallel, build_engine
from mochi_tune.training.checkpoint import load_optimizer, load_tensors
from mochi_tune.training.draws import key_seed
from mochi_tune.training.ema import Average
from mochi_tune.training.evaluate import EvalVideos
from mochi_tune.training.guards import SpikeGuard
from mochi_tune.training.interrupts import Attention, Interrupted, Signals
from mochi_tune.training.loader import Clips, Feed
from mochi_tune.training.lock import RunLock
from mochi_tune.training.metrics import Metrics
from mochi_tune.training.optim import build_optimizer
from mochi_tune.training.preflight import Job, adapter_metadata, begin, check, check_rows, renders
from mochi_tune.training.run import Run, merged
from mochi_tune.training.run_folder import Start
from mochi_tune.training.saves import Saves, copied, made_by, try_room
from mochi_tune.training.schedule import learning_rate_at
from mochi_tune.training.trackers import Trackers
from mochi_tune.training.validation import validation_losses
from mochi_tune.weights.load import load_decoder, load_dit


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
    apply_lora(dit, job.layers, seed, config.lora.dora)
    if job.begins_with is not None and start.folder is None:
        start_from(dit, job.begins_with.layers)
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
        adapter = load_tensors(start.folder / "adapter.safetensors")
        state = load_optimizer(start.folder / "optimizer.safetensors")
        engine.load(
            adapter, state, start.state["groups"],
            lambda: job.draws.loss(engine.dit, clips.batch(job.draws, 1, numbers[0]), device),
        )  # fmt: skip
        if average is not None:
            average.load(load_tensors(start.folder / "averaged.safetensors"))
    saves = None
    if metrics is not None:
        try_room(run_dir, num_bytes * (4 if average is not None else 3))
        saves = Saves(run_dir, metrics, train.keep_checkpoints, train.keep_every, train.keep_best, tqdm.write)
    guard = SpikeGuard(train.spike_policy, train.spike_factor, list(start.state.get("losses", ())))

    def adapter_at(tensors: Mapping[str, Tensor], step: int) -> Adapter:
        about = adapter_metadata(config, job.identity, num_blocks, step) | settings_metadata(job.layers)
        return Adapter(trained_layers(copied(tensors), job.layers), about)

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
            run_dir / "samples", features, draw_noise(config.seed, *sample_size(config.sample, config.data)),
            sampler_settings(config.sample),
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
                    batch = feed.get(gives_up=lambda: is_stopped_waiting(signals, run))
                    if batch is None:
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


def is_stopped_waiting(signals: Signals, run: Run) -> bool:
    """Whether a rank that waits for a disk gives up, as it was asked to stop; saves where it can when it is asked to.

    Raises:
        ParallelError: it cannot tell the others, which wait for it, and ends for all of them.
    """
    stop, save = signals.take()
    # Between two steps nobody else is needed for it, unless the weights are in pieces.
    if (stop or save) and is_first() and (num_ranks() == 1 or isinstance(run.engine, DataParallel)):
        run.save()
    if stop and num_ranks() > 1:
        raise ParallelError("asked to stop while it waited for the data of the next step.")
    return stop > 0


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
            videos.render(dit, run.done, starts_as_base=config.lora.init_from is None)
    attention()


def is_due(step: int, every: int, num_steps: int) -> bool:
    """Whether something that is done every so many steps, and at the last one, is done at this one; 0 is never."""
    return step == num_steps or (every > 0 and step % every == 0)


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
