"""Trains the toy model from scratch on the toy world: autoencoder, text encoder and diffusion transformer.

It takes an hour and a half on two cores. Each part is a stage that saves checkpoints; the same command resumes it.
"""

import json
import string
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from mochi_tune.config.load import load_config
from mochi_tune.errors import ConfigError
from mochi_tune.files import file_sha256, load_tensors, read_json, save_tensors, write_json
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.models.latents import VAE_MEAN, VAE_STD
from mochi_tune.models.vae import Decoder, Encoder, frames_to_pixels
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.toy.initial import (
    DECODER,
    DIT,
    ENCODER,
    Autoencoder,
    build_dit,
    build_text_encoder,
    build_vae,
    first_conv,
    make_tokenizer,
)
from mochi_tune.toy.measure import see
from mochi_tune.toy.samples import reconstruct, render_words, share_shown
from mochi_tune.toy.world import ALL_SHAPES, all_words, draw_clips, ripple, split_words
from mochi_tune.training import checkpoint
from mochi_tune.training.draws import keyed_generator
from mochi_tune.training.interrupts import StopSignal
from mochi_tune.training.objective import noisy_and_target, sample_posterior, velocity_loss
from mochi_tune.training.optim import build_adamw, load_optimizer_state, optimizer_state
from mochi_tune.training.schedule import learning_rate_at
from mochi_tune.weights.files import SUMS
from mochi_tune.weights.folder import WeightsFolder

if TYPE_CHECKING:
    from transformers import T5EncoderModel

SEED = 0
SAVE_EVERY, LOG_EVERY = 250, 25


@dataclass(frozen=True)
class Plan:
    """Numbers of steps, batch sizes and learning rates of all parts."""

    vae_steps: int = 3000
    vae_batch: int = 4
    vae_rate: float = 1.5e-3
    # Number of clips for the channel statistics of the latents, spread evenly over all 432 words.
    num_normalised: int = 432
    # Pulls the posterior towards N(0, 1). A higher weight blurs pictures, a lower one makes latents less smooth.
    kl_weight: float = 3e-4
    text_steps: int = 600
    text_batch: int = 64
    text_rate: float = 3e-3
    num_clips: int = 8960
    dit_steps: int = 14000
    dit_batch: int = 32
    dit_rate: float = 1e-3
    # Compiling takes two minutes, and steps are then 2.5 times as fast.
    dit_compiled: bool = True
    # Number of clips and of captions for measuring the finished model.
    num_measured: int = 100


def main(work: Path, out: Path, plan: Plan) -> dict | None:
    """Trains all parts, or resumes, and writes the weights folder. Returns its record, or None when interrupted.

    Args:
        work: folder of checkpoints and encoded clips, about 300 MB; the same folder resumes the training.
        out: weights folder to write, in the official layout.
        plan: plan of the training.

    Raises:
        ConfigError: the work folder was started with another plan.
    """
    if (out / SUMS).exists():
        return read_json(out / "record.json")
    begun = work / "plan.json"
    if begun.exists() and read_json(begun) != asdict(plan):
        raise ConfigError(f"work={work} was begun with another plan: use another folder, or remove it.")
    work.mkdir(parents=True, exist_ok=True)
    write_json(begun, asdict(plan))
    out.mkdir(parents=True, exist_ok=True)
    vae = build_vae(SEED)
    if not train_stage(work / "vae", vae, plan.vae_steps, plan.vae_rate, lambda step: vae_loss(vae, step, plan)):
        return None
    words = all_words(ALL_SHAPES)
    frames = draw_clips(words[:: len(words) // plan.num_normalised], keyed_generator(SEED, "statistics"))
    normalise_latents(vae.encoder, vae.decoder, frames)
    for name, model in vae.named_children():
        save_part(out / f"{name}.safetensors", model)
    write_json(out / "vae_config.json", {"encoder": asdict(ENCODER), "decoder": asdict(DECODER)})

    make_tokenizer(out / "tokenizer")
    tokenizer = WeightsFolder(out).load_tokenizer()
    text = build_text_encoder(len(tokenizer), SEED)
    if not train_stage(
        work / "text", text, plan.text_steps, plan.text_rate, lambda step: text_loss(text, tokenizer, step, plan)
    ):
        return None
    text.bfloat16().save_pretrained(out / "text_encoder")

    seen, _ = split_words()
    text_encoder = WeightsFolder(out).load_text_encoder("cpu", torch.float32)
    features = torch.stack(text_encoder.encode([words.caption for words in seen]))
    world = encode_world(
        WeightsFolder(out).load_encoder("cpu", torch.float32), work / "world.safetensors", plan.num_clips
    )
    dit = build_dit(SEED)
    if plan.dit_compiled:
        for block in dit.blocks:
            block.compile()
    if not train_stage(
        work / "dit", dit, plan.dit_steps, plan.dit_rate, lambda step: dit_loss(dit, world, features, step, plan)
    ):
        return None
    save_part(out / "dit.safetensors", dit)
    write_json(out / "dit_config.json", asdict(DIT))

    curves = {stage: read_curve(work / stage) for stage in ("vae", "text", "dit")}
    record = {"plan": asdict(plan), "figures": measure_model(out, plan.num_measured), "seconds": {}, "curves": curves}
    record["seconds"] = {stage: round(sum(row["seconds"] for row in curve)) for stage, curve in curves.items()}
    (out / "record.json").write_text(json.dumps(record) + "\n")
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != SUMS)
    write_json(out / SUMS, {path.relative_to(out).as_posix(): file_sha256(path) for path in files})
    return record


def train_stage(
    folder: Path, model: nn.Module, num_steps: int, peak: float, step_loss: Callable[[int], Tensor]
) -> bool:
    """Trains a model with Adam and saves checkpoints. Returns whether the stage is finished.

    Args:
        folder: folder of the stage's checkpoints; training resumes from the newest one.
        model: model in fp32.
        num_steps: number of steps of the stage.
        peak: learning rate after the warm-up.
        step_loss: returns the loss of a step, counted from 1. Its random numbers depend on the step only.
    """
    parameters = dict(model.named_parameters())
    optimizer = build_adamw(parameters.values(), peak, 0.0, "cpu")
    last_step, curve = 0, []
    newest, _ = checkpoint.newest_valid(folder)
    if newest is not None:
        saved = load_tensors(newest / "model.safetensors")
        for name, parameter in parameters.items():
            parameter.data.copy_(saved[name])
        learnt = checkpoint.load_optimizer(newest / "optimizer.safetensors")
        load_optimizer_state(optimizer, parameters, learnt, [{} for _ in optimizer.param_groups])
        state = read_json(newest / "state.json")
        last_step, curve = state["step"], state["curve"]
    losses, started = [], time.perf_counter()
    bar = tqdm(total=num_steps, initial=last_step, desc=folder.name, unit="step")
    with StopSignal() as stop, bar:
        for step in range(last_step + 1, num_steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, peak, 100, num_steps)
            loss = step_loss(step)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            bar.update()
            if step % LOG_EVERY == 0:
                seconds = round(time.perf_counter() - started, 1)
                curve.append({"step": step, "loss": round(sum(losses) / len(losses), 6), "seconds": seconds})
                bar.set_postfix_str(f"loss {curve[-1]['loss']:.5f}", refresh=False)
                losses, started = [], time.perf_counter()
            if stop.received or step % SAVE_EVERY == 0 or step == num_steps:
                with checkpoint.new_checkpoint(folder, step) as new:
                    save_tensors(new / "model.safetensors", {n: p.detach() for n, p in parameters.items()})
                    checkpoint.save_optimizer(new / "optimizer.safetensors", optimizer_state(optimizer, parameters)[0])
                    write_json(new / "state.json", {"step": step, "curve": curve})
                checkpoint.remove_checkpoints(folder, {step})
            if stop.received:
                return step == num_steps
    return True


def vae_loss(vae: Autoencoder, step: int, plan: Plan) -> Tensor:
    """Returns the autoencoder's loss on clips and noise drawn for the step."""
    generator = keyed_generator(SEED, "vae", step)
    words = all_words(ALL_SHAPES)
    chosen = torch.randint(len(words), (plan.vae_batch,), generator=generator).tolist()
    frames = draw_clips([words[i] for i in chosen], generator)
    # Coloured waves on one clip in four teach the VAE more than flat colours.
    frames[0] = ripple(frames[0], generator)
    pixels = frames_to_pixels(frames)
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = vae.encoder(pixels)
        latents = sample_posterior(mean, logvar, torch.randn(mean.shape, generator=generator))
        decoded = vae.decoder(latents).float()
    error = decoded - pixels
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.square().mean() + 0.1 * error.abs().mean() + plan.kl_weight * kl


def text_loss(encoder: "T5EncoderModel", tokenizer, step: int, plan: Plan) -> Tensor:
    """Returns the masked-token loss on captions, some of which have a word replaced by random letters."""
    generator = keyed_generator(SEED, "text", step)
    words = all_words()

    def draw(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    captions = []
    for i in draw(len(words), plan.text_batch):
        parts = words[i].caption.split()
        if draw(4, 1) == [0]:
            letters = [string.ascii_lowercase[j] for j in draw(26, 3 + draw(3, 1)[0])]
            parts[draw(len(parts), 1)[0]] = "".join(letters)
        captions.append(" ".join(parts))
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    hidden = (torch.rand(tokens.input_ids.shape, generator=generator) < 0.15) & (tokens.input_ids > 2)
    visible = tokens.input_ids.masked_fill(hidden, tokenizer.unk_token_id)
    features = encoder(visible, attention_mask=tokens.attention_mask).last_hidden_state
    logits = features @ encoder.shared.weight.T * encoder.config.d_model**-0.5
    valid = tokens.attention_mask.bool()
    return F.cross_entropy(logits[valid], tokens.input_ids[valid])


def encode_world(encoder: Encoder, path: Path, num_clips: int) -> dict[str, Tensor]:
    """Encodes the base model's clips once: posteriors (clips, 12, T, h, w), and the index of each clip's words."""
    if path.exists():
        return load_tensors(path)
    seen, _ = split_words()
    nn.utils.convert_conv3d_weight_memory_format(encoder, torch.channels_last_3d)
    means, logvars, numbers = [], [], []
    for batch in tqdm(range(num_clips // 4), desc="encode", unit="batch"):
        chosen = [(batch * 4 + i) % len(seen) for i in range(4)]
        frames = draw_clips([seen[i] for i in chosen], keyed_generator(SEED, "world", batch))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mean, logvar = encoder(frames_to_pixels(frames))
        means.append(mean)
        logvars.append(logvar)
        numbers += chosen
    world = {"mean": torch.cat(means), "logvar": torch.cat(logvars), "words": torch.tensor(numbers)}
    save_tensors(path, world)
    return world


def dit_loss(dit: AsymmDiT, world: dict[str, Tensor], features: Tensor, step: int, plan: Plan) -> Tensor:
    """Returns the loss of the sampler's objective on a batch. One clip in ten has no caption, as guidance needs."""
    generator = keyed_generator(SEED, "dit", step)
    rows = torch.randint(len(world["mean"]), (plan.dit_batch,), generator=generator)
    mean, logvar = world["mean"][rows], world["logvar"][rows]
    vae_latents = sample_posterior(mean, logvar, torch.randn(mean.shape, generator=generator))
    noise, sigma = torch.randn(mean.shape, generator=generator), torch.rand(plan.dit_batch, generator=generator)
    noisy, target = noisy_and_target("sampler", vae_latents, noise, sigma)
    embeds = features[world["words"][rows]]
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
    num_captioned = plan.dit_batch - plan.dit_batch // 10
    mask[num_captioned:] = False
    losses = []
    # Rows with and without captions run separately: attention over rows of equal length is much faster.
    for part in (slice(0, num_captioned), slice(num_captioned, None)):
        # For few tokens, plain attention is faster than fused attention.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            prediction = dit(noisy[part], sigma[part], embeds[part], mask[part])
        losses.append(velocity_loss(prediction, target[part]))
    return torch.cat(losses).mean()


@torch.no_grad()
def normalise_latents(encoder: Encoder, decoder: Decoder, frames: Tensor) -> None:
    """Folds a scale and a shift into both models, so that latents of `frames` have Mochi's channel statistics.

    The encoder's last layer has no bias. One channel of the norm before it becomes constant and provides the shift.
    """
    pixels = frames_to_pixels(frames)
    activations: list[Tensor] = []
    hook = encoder.output_norm.register_forward_hook(lambda *args: activations.append(args[2].mean((0, 2, 3, 4))))
    moments = [encoder(part) for part in pixels.split(16)]
    hook.remove()
    means, variances = torch.cat([m for m, _ in moments]), torch.cat([v for _, v in moments]).exp()
    deviation, center = means.var((0, 2, 3, 4)).add(variances.mean((0, 2, 3, 4))).sqrt(), means.mean((0, 2, 3, 4))
    scale = torch.tensor(VAE_STD) / deviation
    shift = torch.tensor(VAE_MEAN) - scale * center

    norm, weight = encoder.output_norm, encoder.output_proj.weight
    channel = int(norm.weight.abs().argmin())
    carried = weight[:, channel] * torch.stack(activations).mean(0)[channel]
    norm.weight[channel], norm.bias[channel] = 0, 1
    weight[:, channel] = carried / F.silu(torch.ones(()))
    weight[:12] *= scale[:, None]
    weight[:, channel] += torch.cat([shift, 2 * scale.log()]) / F.silu(torch.ones(()))
    first = first_conv(decoder)
    assert first.bias is not None
    first.weight /= scale.view(1, -1, 1, 1, 1)
    first.bias -= first.weight[:, :, 0, 0, 0] @ shift


def save_part(path: Path, model: nn.Module) -> None:
    """Writes a model's tensors in bf16."""
    save_file({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}, path)


def read_curve(folder: Path) -> list[dict]:
    """Returns the losses and seconds of a finished stage."""
    return read_json(checkpoint.find_checkpoints(folder)[-1] / "state.json")["curve"]


@torch.no_grad()
def measure_model(folder: Path, num_measured: int) -> dict[str, float]:
    """Measures a weights folder on clips and captions outside of its training data."""
    words = all_words(ALL_SHAPES)
    words = words[:: max(1, len(words) // (4 * num_measured))]
    weights = WeightsFolder(folder)
    encoder, decoder = weights.load_encoder("cpu", torch.float32), weights.load_decoder("cpu", torch.float32)
    psnr, kept = [], 0
    for i in tqdm(range(0, len(words), 16), desc="reconstruct", unit="batch"):
        frames = draw_clips(words[i : i + 16], keyed_generator(SEED, "unseen clips", i))
        decoded, decibels = reconstruct(frames, encoder, decoder)
        psnr += decibels
        kept += sum(see(clip).shows(w) for clip, w in zip(decoded, words[i : i + 16], strict=True))
    held_out = split_words()[1][:num_measured]
    dit, text = weights.load_dit("cpu", torch.float32), weights.load_text_encoder("cpu", torch.float32)
    frames = render_words(held_out, dit, text, decoder, sampler_settings(load_config("toy_lora", []).sample), SEED)
    return {
        "vae_psnr_db": round(sum(psnr) / len(psnr), 2),
        "vae_kept": round(kept / len(words), 4),
        "base_obeyed": share_shown(frames, held_out),
    }
