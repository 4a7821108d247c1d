"""Trains a LoRA on a prepared cache: the whole run, from top to bottom. The same command resumes a stopped run."""

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mochi_tune.adapters import Adapter, LoraLayer, save_adapter
from mochi_tune.config import RunConfig, config_yaml, flat_settings, sample_size, sampler_settings, weights_folder
from mochi_tune.data.cache import open_cache
from mochi_tune.data.dataset import LatentDataset, batch_indices, collate
from mochi_tune.errors import DataError, TrainingError
from mochi_tune.files import make_writable_folder
from mochi_tune.flow import draw_posterior, noisy_and_target, velocity_loss
from mochi_tune.lora import apply_lora, linear_shapes, lora_parameters, select_layers
from mochi_tune.models.device import DTYPES, find_device, free_memory
from mochi_tune.models.latents import to_vae_latents
from mochi_tune.models.text_encoder import TextEncoder
from mochi_tune.models.vae_streaming import decode_chunks
from mochi_tune.parallel.context import apply_context_parallel
from mochi_tune.parallel.engine import build_engine
from mochi_tune.parallel.memory import apply_activation_checkpointing
from mochi_tune.parallel.mesh import Layout, Mesh, training_layout
from mochi_tune.parallel.ranks import from_first, is_first, mean_and_most, num_ranks, wait_for_all
from mochi_tune.sampler import draw_noise, sample_latents
from mochi_tune.training import checkpoint
from mochi_tune.training.lock import RunLock
from mochi_tune.training.metrics import Metrics
from mochi_tune.training.optim import build_adamw, learning_rate_at
from mochi_tune.training.resume import bound, resume_step
from mochi_tune.training.rng import key_seed, keyed_generator
from mochi_tune.training.signals import StopSignal
from mochi_tune.video import write_video
from mochi_tune.weights import (
    base_identity,
    check_weights,
    fingerprint,
    has_part,
    load_decoder,
    load_dit,
    meta_dit,
)

VALIDATION_SIGMAS = (0.125, 0.375, 0.625, 0.875)


@dataclass(frozen=True)
class Job:
    """What is to be trained, checked as far as it can be before a weight is read."""

    folder: Path
    dataset: LatentDataset
    layers: list[str]
    identity: dict
    layout: Layout


def main(config: RunConfig) -> int:
    """Runs or resumes a training, as one process or one of several.

    Returns the exit code, 0 or 128 + the signal that stopped it.
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
    data = config.data
    # The encoders need not lie where the training runs; where they do, the cache must be theirs.
    vae, t5 = (fingerprint(folder, part) if has_part(folder, part) else None for part in ("encoder", "text_encoder"))
    size = {"num_frames": data.num_frames, "height": data.height, "width": data.width}
    cache = open_cache(Path(data.cache), **size, vae_fingerprint=vae, t5_fingerprint=t5)
    dataset, skeleton = LatentDataset(cache), meta_dit(folder)
    check_text_width(dataset, skeleton.config.t5_feat_dim)
    layers = select_layers(linear_shapes(skeleton), config.lora.targets)
    layout = training_layout(num_processes, skeleton.config.num_heads, config.parallel.context or 1)
    settings = flat_settings(config)
    # What is learnt depends on how many samples make a step, not on who computes them.
    settings["global_batch"] = config.train.batch_size * config.train.accumulation_steps * layout.data
    identity = {"settings": settings, "cache": cache.fingerprint, "base": base_identity(folder)}
    return Job(folder, dataset, layers, identity, layout)


def train_locked(config: RunConfig, job: Job, device: torch.device, mesh: Mesh | None) -> int:
    """Loads, trains and saves in a run folder that is ours alone."""
    run_dir, train, dtype = Path(config.run_dir), config.train, DTYPES[config.model.dtype]
    folder, dataset, identity = job.folder, job.dataset, job.identity
    # Only the first rank writes; the others learn from it where the run stands.
    last_step = checkpoints = None
    if is_first():
        checkpoints = checkpoint.find_checkpoints(run_dir / "checkpoints")
        last_step = resume_step(run_dir, checkpoints, identity)
    last_step, checkpoints = from_first((last_step, checkpoints))
    if last_step >= train.steps:
        return 0
    metrics = None
    if is_first():
        (run_dir / "config.yaml").write_text(config_yaml(config))
        metrics = Metrics(run_dir, last_step)
        if config.log.wandb != "disabled":
            settings = identity["settings"]
            metrics.start_wandb(config.log.wandb, config.log.wandb_project, config.name, run_dir, settings)

    # One large model at a time: T5 leaves before the DiT comes.
    features = encode_prompts(config, folder, device)
    dit = load_dit(folder, device, dtype)
    seed = key_seed(config.seed, "adapter")
    apply_lora(dit, job.layers, config.lora.rank, config.lora.alpha, config.lora.dropout, seed)
    if train.gradient_checkpointing:
        apply_activation_checkpointing(dit)
    if job.layout.context > 1:
        apply_context_parallel(dit, mesh.context_group)
    parameters, num_blocks = lora_parameters(dit), len(dit.blocks)
    optimizer = build_adamw(parameters.values(), train.learning_rate, train.weight_decay, device.type)
    engine = build_engine(
        config.parallel.strategy, dit, parameters, optimizer, train.accumulation_steps, train.max_grad_norm
    )
    dit = engine.dit
    place = Place(0 if mesh is None else mesh.data_rank, job.layout.data)
    if checkpoints:
        adapter = checkpoint.load_tensors(checkpoints[-1] / "adapter.safetensors")
        state = checkpoint.load_optimizer(checkpoints[-1] / "optimizer.safetensors")
        engine.load(adapter, state, lambda: micro_loss(config, dit, dataset, place, 1, 0, device))

    def save(step: int) -> None:
        """Writes a checkpoint, then the run's adapter."""
        tensors, state = engine.adapter(), engine.optimizer_state()
        if not is_first():
            return
        adapter = Adapter(
            adapter_layers(tensors, config.lora.alpha), adapter_metadata(config, identity, num_blocks, step)
        )
        with checkpoint.new_checkpoint(run_dir / "checkpoints", step, train.keep_checkpoints) as new:
            save_adapter(new / "adapter.safetensors", adapter)
            checkpoint.save_optimizer(new / "optimizer.safetensors", state)
            checkpoint.write_json(new / "state.json", {"step": step, **identity})
        newest = run_dir / "checkpoints" / f"step_{step:06d}" / "adapter.safetensors"
        checkpoint.replace_file(newest, run_dir / "adapter.safetensors")

    def look(step: int) -> None:
        """Validates and renders, all ranks together, where this step asks for it and it was not done before a stop."""
        validates = train.validate_every and train.validation_clips and is_due(step, train.validate_every, train.steps)
        if validates and from_first(metrics and not metrics.is_validated(step)):
            loss = validation_loss(config, dit, dataset)
            if is_first():
                metrics.log_validation({"step": step, "validation_loss": loss})
        if features and is_due(step, train.sample_every, train.steps):
            render(config, dit, features, folder, run_dir / "samples", step)

    dit.train()
    bar = tqdm(total=train.steps, initial=last_step, desc="train", unit="step", disable=not is_first())
    with metrics or contextlib.nullcontext(), StopSignal() as stop, bar as progress:
        # At step 0, or at the step that a stopped run had saved and not looked at yet.
        look(last_step)
        for step in range(last_step + 1, train.steps + 1):
            started = time.perf_counter()
            learning_rate = learning_rate_at(step, train.learning_rate, train.warmup_steps, train.steps)
            engine.set_learning_rate(learning_rate)
            losses = []
            for micro in range(train.accumulation_steps):
                loss = micro_loss(config, dit, dataset, place, step, micro, device)
                engine.backward(loss, is_last=micro == train.accumulation_steps - 1)
                losses.append(loss.detach())
            # The one wait for the device in a step, and for the other ranks.
            loss, grad_norm = torch.stack([torch.stack(losses).mean(), engine.gradient_norm()]).tolist()
            loss, stopped_by = mean_and_most(loss, stop.received)
            clips, sigmas = drawn(config, dataset, step, place.count)
            check_finite(step, loss, grad_norm, clips, sigmas, run_dir)
            engine.update()

            seconds = round(time.perf_counter() - started, 4)
            row = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": learning_rate, "seconds": seconds}
            if is_first():
                metrics.log({**row, "clips": clips, "sigmas": [round(s, 6) for s in sigmas]})
            progress.set_postfix_str(
                f"loss {loss:.4f}, norm {grad_norm:.3f}, lr {learning_rate:.1e}, {seconds:.2f} s/step", refresh=False
            )
            progress.update()
            # Saved before it is looked at: a look takes long, and may be what fails.
            if stopped_by or is_due(step, train.checkpoint_every, train.steps):
                save(step)
            if stopped_by and step < train.steps:
                break
            look(step)
    wait_for_all()
    if stopped_by and step < train.steps:
        tell(f"stopped after step {step} of {train.steps}, saved; the same command goes on from there")
        return 128 + stopped_by
    tell(f"adapter: {run_dir / 'adapter.safetensors'}")
    return 0


def tell(text: str) -> None:
    """Writes a line beside the progress bar, once."""
    if is_first():
        tqdm.write(text)


def is_due(step: int, every: int, num_steps: int) -> bool:
    """Whether something that is done every so many steps, and at the last one, is done at this one; 0 is never."""
    return step == num_steps or (every > 0 and step % every == 0)


def check_text_width(dataset: LatentDataset, width: int) -> None:
    """Refuses a cache whose text features are those of another T5 than the DiT's.

    Raises:
        DataError: their width is not the DiT's.
    """
    found = dataset[0]["prompt_embeds"].shape[1]
    if found != width:
        raise DataError(
            f"the cache {dataset.cache.folder} has text features of width {found}, the DiT takes {width}: "
            "run `mochi-tune prepare` with this model, or name another folder in data.cache."
        )


def renders(config: RunConfig) -> bool:
    """Whether the run renders eval videos."""
    return bool(config.train.sample_every and config.train.sample_prompts)


def encode_prompts(config: RunConfig, folder: Path, device: torch.device) -> list[torch.Tensor]:
    """Returns the features of the eval prompts and, last, of the negative prompt; nothing where none is rendered."""
    if not renders(config):
        return []
    encoder = TextEncoder.load(folder, device, torch.float32)
    prompts = [*config.train.sample_prompts, config.sample.negative_prompt]
    features = [features.cpu() for features in encoder.encode(prompts)]
    del encoder
    free_memory()
    return features


@dataclass(frozen=True)
class Place:
    """Which rank of those that share a global batch this one is, of how many."""

    rank: int
    count: int

    def number(self, micro: int) -> int:
        """Returns the number of a micro-batch among all of a step's, which does not depend on who computes it."""
        return micro * self.count + self.rank


def micro_loss(
    config: RunConfig,
    dit: torch.nn.Module,
    dataset: LatentDataset,
    place: Place,
    step: int,
    micro: int,
    device: torch.device,
) -> torch.Tensor:
    """Returns the mean loss of one micro-batch, drawn by (seed, step, number) alone."""
    number = place.number(micro)
    batch = collate([dataset[i] for i in micro_indices(config, len(dataset), step, number, place.count)])
    noisy, target, sigma = draw_batch(config, batch, step, number)
    torch.manual_seed(key_seed(config.seed, "dropout", step, number))
    embeds, mask = batch["prompt_embeds"].to(device), batch["prompt_mask"]
    return velocity_loss(dit(noisy.to(device), sigma.to(device), embeds, mask), target.to(device)).mean()


def micro_indices(config: RunConfig, num_clips: int, step: int, number: int, num_ranks: int) -> list[int]:
    """Returns the clips of a step's micro-batch of a number."""
    batch = (step - 1) * config.train.accumulation_steps * num_ranks + number
    return batch_indices(batch, num_clips=num_clips, batch_size=config.train.batch_size, seed=config.seed)


def drawn(config: RunConfig, dataset: LatentDataset, step: int, num_ranks: int) -> tuple[list[str], list[float]]:
    """Returns the clips and sigmas of a step, of all ranks: anyone knows them, as they are drawn by their keys."""
    clips, sigmas = [], []
    for number in range(config.train.accumulation_steps * num_ranks):
        for row, index in enumerate(micro_indices(config, len(dataset), step, number, num_ranks)):
            clips.append(dataset.cache.rows[index].path)
            sigmas.append(draw_sigma(sample_generator(config, step, number, row)).item())
    return clips, sigmas


def sample_generator(config: RunConfig, step: int, number: int, row: int) -> torch.Generator:
    """Returns the generator of everything that is drawn for one sample of a step's micro-batch of a number."""
    return keyed_generator(config.seed, "train", step, number * config.train.batch_size + row)


def draw_sigma(generator: torch.Generator) -> torch.Tensor:
    """Draws a noise level, the first of a sample's draws."""
    return torch.rand((), generator=generator)


def draw_batch(
    config: RunConfig, batch: dict, step: int, number: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws posterior, noise, sigma and caption dropout of a step's micro-batch, each sample by its own key.

    Returns the noisy input and the target, (B, C, T, h, w) fp32, and sigma (B,); drops captions in `batch`.
    """
    posterior_noise, noise, sigma = [], [], []
    for row, mean in enumerate(batch["mean"]):
        generator = sample_generator(config, step, number, row)
        sigma.append(draw_sigma(generator))
        dropped = torch.rand((), generator=generator) < config.train.caption_dropout
        posterior_noise.append(torch.randn(mean.shape, generator=generator))
        noise.append(torch.randn(mean.shape, generator=generator))
        if dropped:
            batch["prompt_embeds"][row] = 0
            batch["prompt_mask"][row] = False
    vae_latents = draw_posterior(batch["mean"], batch["logvar"], torch.stack(posterior_noise))
    sigma = torch.stack(sigma)
    return *noisy_and_target(config.train.objective, vae_latents, torch.stack(noise), sigma), sigma


@torch.no_grad()
def validation_loss(config: RunConfig, dit: torch.nn.Module, dataset: LatentDataset) -> float:
    """Returns the loss on fixed clips, noise and sigmas: what the noise of the training loss hides shows here."""
    device = next(dit.parameters()).device
    dit.eval()
    losses = []
    for index in range(min(config.train.validation_clips, len(dataset))):
        batch = collate([dataset[index]])
        generator = keyed_generator(config.seed, "validation", index)
        noise = torch.randn(batch["mean"].shape, generator=generator)
        for value in VALIDATION_SIGMAS:
            sigma = torch.tensor([value])
            noisy, target = noisy_and_target(config.train.objective, batch["mean"], noise, sigma)
            prediction = dit(
                noisy.to(device), sigma.to(device), batch["prompt_embeds"].to(device), batch["prompt_mask"]
            )
            losses.append(velocity_loss(prediction, target.to(device)).mean())
    dit.train()
    return torch.stack(losses).mean().item()


def render(
    config: RunConfig, dit: torch.nn.Module, features: list[torch.Tensor], folder: Path, samples: Path, step: int
) -> None:
    """Renders the eval prompts by the sampler's own code, with the live adapter and the same seed at every step."""
    noise = draw_noise(config.seed, *sample_size(config))
    *prompts, negative_prompt = features
    paths = [samples / f"step_{step:06d}_prompt_{i}.mp4" for i in range(len(prompts))]
    missing = from_first([not path.exists() for path in paths])
    latents = {
        path: sample_latents(dit, noise, prompt, negative_prompt, sampler_settings(config), path.stem).cpu()
        for path, prompt, is_missing in zip(paths, prompts, missing, strict=True)
        if is_missing
    }
    if not latents or not is_first():
        return
    decoder = load_decoder(folder, next(dit.parameters()).device, DTYPES[config.model.dtype])
    for path, each in latents.items():
        write_video(path, (chunk[0] for chunk in decode_chunks(decoder, to_vae_latents(each))))


def check_finite(
    step: int, loss: float, grad_norm: float, clips: list[str], sigmas: list[float], run_dir: Path
) -> None:
    """Stops the run before an update that would ruin the adapter.

    Raises:
        TrainingError: the loss or the gradient norm is not finite; the text names the clips.
    """
    if torch.isfinite(torch.tensor([loss, grad_norm])).all():
        return
    samples = ", ".join(f"{clip} (sigma {sigma:.3f})" for clip, sigma in zip(clips, sigmas, strict=True))
    kept = checkpoint.find_checkpoints(run_dir / "checkpoints")
    last = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
    raise TrainingError(
        f"step {step}: loss {loss}, gradient norm {grad_norm} on {samples}; the update was not made and {last}: "
        "lower train.learning_rate, or look at these clips."
    )


def adapter_layers(tensors: Mapping[str, torch.Tensor], alpha: float) -> dict[str, LoraLayer]:
    """Returns an adapter's layers of its tensors, "LAYER.lora_A" and "LAYER.lora_B"."""
    names = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    return {name: LoraLayer(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], alpha) for name in names}


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
