"""Trains a LoRA on a prepared cache: the whole run, from top to bottom. The same command resumes a stopped run."""

import filecmp
import hashlib
import json
import time
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
from mochi_tune.parallel.memory import apply_activation_checkpointing
from mochi_tune.sampler import draw_noise, sample_latents
from mochi_tune.training import checkpoint
from mochi_tune.training.lock import RunLock
from mochi_tune.training.metrics import Metrics
from mochi_tune.training.optim import build_adamw, learning_rate_at
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
# What may differ between the start of a run and its resuming: it changes what is looked at or kept, not what is learnt.
# The data's own settings are held by the cache's fingerprint.
FREE_TO_CHANGE = ("name", "run_dir", "device", "model.weights", "data.", "sample.", "log.", "train.steps")
FREE_TO_CHANGE += ("train.checkpoint_", "train.keep_", "train.valid", "train.sample_", "train.gradient_")


def main(config: RunConfig) -> int:
    """Runs or resumes a training; returns the exit code, 0 or 128 + the signal that stopped it."""
    device = find_device(config.device)
    folder, run_dir = weights_folder(config), Path(config.run_dir)

    # Everything that can be refused is refused before a weight is read.
    check_weights(folder, ["dit", "decoder", "text_encoder"] if renders(config) else ["dit"])
    data = config.data
    # The encoders need not lie where the training runs; where they do, the cache must be theirs.
    vae, t5 = (fingerprint(folder, part) if has_part(folder, part) else None for part in ("encoder", "text_encoder"))
    size = {"num_frames": data.num_frames, "height": data.height, "width": data.width}
    cache = open_cache(Path(data.cache), **size, vae_fingerprint=vae, t5_fingerprint=t5)
    dataset, skeleton = LatentDataset(cache), meta_dit(folder)
    check_text_width(dataset, skeleton.config.t5_feat_dim)
    layers = select_layers(linear_shapes(skeleton), config.lora.targets)
    identity = {"settings": flat_settings(config), "cache": cache.fingerprint, "base": base_identity(folder)}
    make_writable_folder(run_dir / "samples")
    with RunLock(run_dir):
        return train_locked(config, device, folder, dataset, layers, identity)


def train_locked(
    config: RunConfig, device: torch.device, folder: Path, dataset: LatentDataset, layers: list[str], identity: dict
) -> int:
    """Loads, trains and saves in a run folder that is ours alone."""
    run_dir, train, dtype = Path(config.run_dir), config.train, DTYPES[config.model.dtype]
    checkpoints = checkpoint.find_checkpoints(run_dir / "checkpoints")
    last_step = resume_step(run_dir, checkpoints, identity)
    if last_step >= train.steps:
        return 0
    (run_dir / "config.yaml").write_text(config_yaml(config))
    metrics = Metrics(run_dir, last_step)
    if config.log.wandb != "disabled":
        metrics.start_wandb(config.log.wandb, config.log.wandb_project, config.name, run_dir, identity["settings"])

    # One large model at a time: T5 leaves before the DiT comes.
    features = encode_prompts(config, folder, device)
    dit = load_dit(folder, device, dtype)
    apply_lora(dit, layers, config.lora.rank, config.lora.alpha, config.lora.dropout, key_seed(config.seed, "adapter"))
    if train.gradient_checkpointing:
        apply_activation_checkpointing(dit)
    parameters, num_blocks = lora_parameters(dit), len(dit.blocks)
    optimizer = build_adamw(parameters.values(), train.learning_rate, train.weight_decay, device.type)
    if checkpoints:
        load_parameters(checkpoints[-1] / "adapter.safetensors", parameters)
        checkpoint.load_optimizer(checkpoints[-1] / "optimizer.safetensors", optimizer, parameters)

    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu")
    dit, optimizer = accelerator.prepare(dit, optimizer)

    def save(step: int) -> None:
        """Writes a checkpoint, then the run's adapter."""
        metadata = adapter_metadata(config, identity, num_blocks, step)
        adapter = Adapter(adapter_layers(parameters, config.lora.alpha), metadata)
        with checkpoint.new_checkpoint(run_dir / "checkpoints", step, train.keep_checkpoints) as new:
            save_adapter(new / "adapter.safetensors", adapter)
            state = checkpoint.optimizer_tensors(optimizer, parameters)
            checkpoint.save_tensors(new / "optimizer.safetensors", state)
            checkpoint.write_json(new / "state.json", {"step": step, **identity})
        newest = run_dir / "checkpoints" / f"step_{step:06d}" / "adapter.safetensors"
        checkpoint.replace_file(newest, run_dir / "adapter.safetensors")

    def look(step: int) -> None:
        """Validates and renders where this step asks for it and it was not done before a stop."""
        validates = train.validate_every and train.validation_clips
        if validates and is_due(step, train.validate_every, train.steps) and not metrics.is_validated(step):
            metrics.log_validation({"step": step, "validation_loss": validation_loss(config, dit, dataset)})
        if features and is_due(step, train.sample_every, train.steps):
            render(config, dit, features, folder, run_dir / "samples", step)

    dit.train()
    bar = tqdm(total=train.steps, initial=last_step, desc="train", unit="step")
    with metrics, StopSignal() as stop, bar as progress:
        # At step 0, or at the step that a stopped run had saved and not looked at yet.
        look(last_step)
        for step in range(last_step + 1, train.steps + 1):
            started = time.perf_counter()
            learning_rate = learning_rate_at(step, train.learning_rate, train.warmup_steps, train.steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            losses, sigmas, clips = [], [], []
            for micro in range(train.accumulation_steps):
                number = (step - 1) * train.accumulation_steps + micro
                indices = batch_indices(number, num_clips=len(dataset), batch_size=train.batch_size, seed=config.seed)
                batch = collate([dataset[i] for i in indices])
                noisy, target, sigma = draw_batch(config, batch, step, micro)
                torch.manual_seed(key_seed(config.seed, "dropout", step, micro))
                embeds, mask = batch["prompt_embeds"].to(device), batch["prompt_mask"]
                loss = velocity_loss(dit(noisy.to(device), sigma.to(device), embeds, mask), target.to(device)).mean()
                accelerator.backward(loss / train.accumulation_steps)
                losses.append(loss.detach())
                sigmas += sigma.tolist()
                clips += batch["sample_ids"]
            norm = accelerator.clip_grad_norm_(list(parameters.values()), train.max_grad_norm)
            # The one wait for the device in a step.
            loss, grad_norm = torch.stack([torch.stack(losses).mean(), norm]).tolist()
            check_finite(step, loss, grad_norm, clips, sigmas, run_dir)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            seconds = round(time.perf_counter() - started, 4)
            row = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": learning_rate, "seconds": seconds}
            metrics.log({**row, "clips": clips, "sigmas": [round(s, 6) for s in sigmas]})
            progress.set_postfix_str(
                f"loss {loss:.4f}, norm {grad_norm:.3f}, lr {learning_rate:.1e}, {seconds:.2f} s/step", refresh=False
            )
            progress.update()
            # Saved before it is looked at: a look takes long, and may be what fails.
            if stop.received or is_due(step, train.checkpoint_every, train.steps):
                save(step)
            if stop.received and step < train.steps:
                break
            look(step)
    if stop.received and step < train.steps:
        tqdm.write(f"stopped after step {step} of {train.steps}, saved; the same command goes on from there")
        return 128 + stop.received
    tqdm.write(f"adapter: {run_dir / 'adapter.safetensors'}")
    return 0


def is_due(step: int, every: int, num_steps: int) -> bool:
    """Whether something that is done every so many steps, and at the last one, is done at this one; 0 is never."""
    return step == num_steps or (every > 0 and step % every == 0)


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


def draw_batch(
    config: RunConfig, batch: dict, step: int, micro: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws posterior, noise, sigma and caption dropout of a batch, each sample by its own key.

    Returns the noisy input and the target, (B, C, T, h, w) fp32, and sigma (B,); drops captions in `batch`.
    """
    posterior_noise, noise, sigma = [], [], []
    for row, mean in enumerate(batch["mean"]):
        generator = keyed_generator(config.seed, "train", step, micro * config.train.batch_size + row)
        sigma.append(torch.rand((), generator=generator))
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
    latents = {
        path: sample_latents(dit, noise, prompt, negative_prompt, sampler_settings(config), path.stem).cpu()
        for path, prompt in zip(paths, prompts, strict=True)
        if not path.exists()
    }
    if not latents:
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


def adapter_layers(parameters: dict[str, torch.nn.Parameter], alpha: float) -> dict[str, LoraLayer]:
    """Returns the adapter's layers as they are now."""
    names = [name.removesuffix(".lora_A") for name in parameters if name.endswith(".lora_A")]
    return {
        name: LoraLayer(parameters[f"{name}.lora_A"].detach(), parameters[f"{name}.lora_B"].detach(), alpha)
        for name in names
    }


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


def load_parameters(path: Path, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Puts a checkpoint's adapter back into the live one."""
    tensors = checkpoint.load_tensors(path)
    assert tensors.keys() == parameters.keys(), "the settings were compared, so the layers are the same"
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])
