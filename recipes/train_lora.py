"""Trains a LoRA on a prepared cache: the whole run, from top to bottom. The same command resumes a stopped run."""

import contextlib
import faulthandler
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mochi_tune.config import RunConfig, config_yaml, flat_settings, sample_size, sampler_settings, weights_folder
from mochi_tune.data.cache import open_cache
from mochi_tune.data.dataset import LatentDataset
from mochi_tune.errors import ConfigError, DataError, TrainingError
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
from mochi_tune.training.guards import SpikeGuard, is_finite, write_bundle
from mochi_tune.training.lock import RunLock
from mochi_tune.training.metrics import Metrics
from mochi_tune.training.optim import build_optimizer, check_installed
from mochi_tune.training.resume import Start, bound, find_start, take_back
from mochi_tune.training.rng import draws_proof, key_seed
from mochi_tune.training.saves import Saves, Snapshot, adapter_of, made_by, record_start, try_room
from mochi_tune.training.schedule import learning_rate_at
from mochi_tune.training.signals import Attention, Interrupted, Signals
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
    run_dir, train, dtype = Path(config.run_dir), config.train, DTYPES[config.model.dtype]
    # Only the first rank writes; the others learn from it where the run stands.
    start, metrics = from_first(begin(config, job, device) if is_first() else None), None
    done = saved = start.step
    if done >= train.steps:
        return 0
    if is_first():
        metrics = Metrics(run_dir, done)
        if config.log.wandb != "disabled":
            metrics.start_wandb(config.log.wandb, config.log.wandb_project, config.name, run_dir, flat_settings(config))

    # One large model at a time: T5 leaves before the DiT comes.
    features = encode_prompts(config, job.folder, device)
    dit = load_dit(job.folder, device, dtype)
    apply_lora(
        dit, job.layers, config.lora.rank, config.lora.alpha, config.lora.dropout, key_seed(config.seed, "adapter")
    )
    if train.gradient_checkpointing:
        apply_activation_checkpointing(dit)
    if job.layout.context > 1:
        apply_context_parallel(dit, mesh.context_group)
    parameters, num_blocks = lora_parameters(dit), len(dit.blocks)
    num_bytes = sum(4 * parameter.numel() for parameter in parameters.values())
    optimizer = build_optimizer(
        train.optimizer, parameters, train.learning_rate, train.weight_decay, train.learning_rate_b_ratio, device.type
    )
    engine = build_engine(
        config.parallel.strategy, dit, parameters, optimizer, train.accumulation_steps, train.max_grad_norm
    )
    dit, draws = engine.dit, job.draws
    numbers = list(range(0 if mesh is None else mesh.data_rank, draws.num_micro_batches, job.layout.data))
    taught = [i for i in range(len(job.dataset)) if not job.is_held_out or i not in job.validation]
    clips = Clips(job.dataset, taught, config.data.damaged == "strict", tqdm.write)
    average = Average(engine.weights(), train.ema_decay) if train.ema_decay else None
    guard = SpikeGuard(train.spike_policy, train.spike_factor, list(start.state.get("losses", ())))
    if start.folder is not None:
        state = checkpoint.load_optimizer(start.folder / "optimizer.safetensors")
        adapter = checkpoint.load_tensors(start.folder / "adapter.safetensors")
        engine.load(
            adapter, state, start.state["groups"], lambda: draws.loss(dit, clips.batch(draws, 1, numbers[0]), device)
        )
        if average is not None:
            average.load(checkpoint.load_tensors(start.folder / "averaged.safetensors"))
    saves = None
    if is_first():
        saves = Saves(run_dir, metrics, train.keep_checkpoints, train.keep_every, train.keep_best, tqdm.write)
        try_room(run_dir, num_bytes * (4 if train.ema_decay else 3))

    def shown() -> Mapping[str, Tensor] | None:
        return average.tensors if average is not None else engine.shown_weights()

    def save() -> None:
        """Writes a checkpoint of the last step that is done, unless there is one, then the run's adapter."""
        nonlocal saved
        if saved == done:
            return
        tensors, averaged, (state, groups) = engine.weights(), shown(), engine.optimizer_state()
        if is_first():
            rest = {"groups": groups, "losses": guard.losses, "rows": metrics.num_rows()}
            whole = {"step": done, **job.identity, **rest, "made_by": made_by(config.parallel.strategy, device)}
            about = adapter_metadata(config, job.identity, num_blocks, done)
            adapters = [values and adapter_of(values, about, config.lora.alpha) for values in (tensors, averaged)]
            saves.save(Snapshot(done, *adapters, state, whole))
        saved = done

    def look() -> None:
        """Validates and renders, all ranks together, where this step asks for it and it was not done before a stop."""
        validates = train.validate_every and job.validation and is_due(done, train.validate_every, train.steps)
        validates = validates and from_first(metrics and not metrics.is_validated(done))
        renders_now = features and is_due(done, train.sample_every, train.steps)
        if not validates and not renders_now:
            return
        with engine.showing(shown()):
            if validates:
                losses = validation_losses(
                    dit, job.dataset, job.validation, config.seed, train.objective, device, attention
                )
                if is_first():
                    mean = sum(losses.values()) / len(losses)
                    row = {"step": done, "validation_loss": mean, "bins": losses, "held_out": job.is_held_out}
                    metrics.log_validation({**row, "sigmas_drawn": metrics.sigma_histogram()})
            if renders_now:
                videos.render(dit, done, starts_as_base=True)
        attention()

    def stop_here(why: str, step: int, loss: float, grad_norm: float, drawn: dict) -> int:
        """Ends the run before an update that would harm it, with all that is needed to look into it."""
        tensors = engine.weights()
        save()
        if not is_first():
            return 2
        facts = {"step": step, "why": why, "loss": loss, "grad_norm": grad_norm, "seed": config.seed, **drawn}
        bundle = write_bundle(run_dir / "bundles", facts, tensors, config_yaml(config))
        samples = ", ".join(f"{c} (sigma {s:.3f})" for c, s in zip(drawn["clips"], drawn["sigmas"], strict=True))
        raise TrainingError(
            f"step {step}: {why}: loss {loss}, gradient norm {grad_norm} on {samples}; the update was not made and "
            f"{saves.last()}: `mochi-tune replay {bundle}` makes that step again, or lower train.learning_rate."
        )

    dit.train()
    places = ((step, number) for step in range(done + 1, train.steps + 1) for number in numbers)
    bar = tqdm(total=train.steps, initial=done, desc="train", unit="step", disable=not is_first())
    watchdog = 0.9 * config.parallel.timeout_seconds if num_ranks() > 1 else 0
    feed = Feed(lambda step, number: clips.batch(draws, step, number), places)
    stopped_by = 0
    with metrics or contextlib.nullcontext(), Signals() as signals, feed, bar as progress:
        attention = Attention(signals, gathered, save, watchdog)
        videos = EvalVideos(
            run_dir / "samples", features, draw_noise(config.seed, *sample_size(config)), sampler_settings(config),
            lambda: load_decoder(job.folder, device, dtype), attention, lambda: signals.received > 0,
        )  # fmt: skip
        try:
            # At step 0, or at the step that a stopped run had saved and not looked at yet.
            look()
            while done < train.steps:
                step, started = done + 1, time.perf_counter()
                learning_rate = learning_rate_at(
                    step, train.learning_rate, train.warmup_steps, train.steps, train.schedule, train.decay_share
                )
                engine.set_learning_rate(learning_rate)
                losses, mine = [], {}
                for number in numbers:
                    # Alone, a process need not wait for a disk when it is asked to stop.
                    batch = feed.get(gives_up=lambda: signals.received > 0 and num_ranks() == 1)
                    if batch is None:
                        engine.discard()
                        raise Interrupted
                    loss = draws.loss(dit, batch, device)
                    engine.backward(loss, is_last=number == numbers[-1])
                    losses.append(loss.detach())
                    mine[number] = batch.clips, batch.sigma.tolist()
                # The one wait for the device in a step, and for the other ranks.
                *values, grad_norm = torch.stack([*losses, engine.gradient_norm()]).tolist()
                mine = {number: (value, *mine[number]) for number, value in zip(numbers, values, strict=True)}
                stopped_by, asks_to_save, everyones = attention.agreed(mine)
                whole = [each for _, each in sorted({n: e for one in everyones for n, e in one.items()}.items())]
                loss = sum(value for value, _, _ in whole) / len(whole)
                drawn = {"clips": [c for _, clips, _ in whole for c in clips]}
                drawn["sigmas"] = [round(s, 6) for _, _, sigmas in whole for s in sigmas]
                verdict = guard.verdict(loss) if is_finite(loss, grad_norm) else "not finite"
                if verdict in ("not finite", "stop"):
                    why = verdict if verdict == "not finite" else f"a loss of {guard.excess(loss):.0f} times the usual"
                    return stop_here(why, step, loss, grad_norm, drawn)
                if verdict == "skip":
                    engine.discard()
                else:
                    engine.update()
                    guard.made(loss)
                    if average is not None:
                        average.update(engine.weights(), step)
                done = step

                seconds = round(time.perf_counter() - started, 4)
                row = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": learning_rate, "seconds": seconds}
                if is_first():
                    if verdict:
                        tqdm.write(
                            f"step {step}: loss {loss:.4f} is {guard.excess(loss):.0f} times the usual: {verdict}"
                        )
                        row["spike"] = verdict
                    metrics.log(row | drawn)
                progress.set_postfix_str(
                    f"loss {loss:.4f}, norm {grad_norm:.3f}, lr {learning_rate:.1e}, {seconds:.2f} s/step",
                    refresh=False,
                )
                progress.update()
                # Saved before it is looked at: a look takes long, and may be what fails.
                if stopped_by or asks_to_save or is_due(step, train.checkpoint_every, train.steps):
                    save()
                if stopped_by and done < train.steps:
                    raise Interrupted
                look()
        except Interrupted:
            stopped_by = max(stop for stop, _ in gathered(signals.take())) if num_ranks() > 1 else signals.received
            save()
        finally:
            faulthandler.cancel_dump_traceback_later()
    wait_for_all()
    if is_first():
        saves.check_saved(done)
        if stopped_by and done < train.steps:
            where = f"step {done}, saved" if done else "the first step"
            tqdm.write(f"stopped after {where}, of {train.steps}; the same command goes on from there")
        else:
            tqdm.write(f"adapter: {run_dir / 'adapter.safetensors'}")
    return 128 + stopped_by if stopped_by and done < train.steps else 0


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
