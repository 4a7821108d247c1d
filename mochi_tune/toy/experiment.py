"""Compares ways of training on the toy model: the same lesson, the same everything else, several seeds each."""

import statistics
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mochi_tune.adapters.files import Adapter, load_adapter
from mochi_tune.adapters.lora import apply_adapter, linear_shapes, select_layers
from mochi_tune.config.load import load_config, weights_paths
from mochi_tune.config.settings import flat_settings
from mochi_tune.data_prep.prepare import main as prepare
from mochi_tune.errors import ConfigError, MochiTuneError
from mochi_tune.files import read_json, write_json
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.models.latents import FPS
from mochi_tune.models.text_encoder import TextEncoder
from mochi_tune.models.vae import frames_to_pixels
from mochi_tune.recipes.train_lora import main as train
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.toy.lesson import asked_words, write_lesson
from mochi_tune.toy.measure import colour_error
from mochi_tune.toy.samples import render_words, share_new, share_shown
from mochi_tune.toy.world import Words, draw_clips
from mochi_tune.training.draws import keyed_generator
from mochi_tune.training.objective import noisy_and_target, velocity_loss
from mochi_tune.weights.folder import WeightsFolder

NUM_SAMPLES = 50
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
# What is measured, in the order of the table.
COLUMNS = {
    "loss_new": "loss, new",
    "loss_base": "loss, old",
    "new": "new thing",
    "new_all": "new, all three",
    "base": "old captions",
    "colour_error": "colour error",
    "unevenness": "unevenness",
}
# Frames a second that the clips of an experiment are drawn at, where it is not 30.
DRAWN_AT = {"frame_rate": 24}


def main(what: str, num_seeds: int, out: Path, *settings: str, num_samples: int = NUM_SAMPLES) -> str:
    """Trains each arm with each seed where that is not done yet, and returns the table as Markdown.

    Args:
        what: a key of `arms()`.
        num_seeds: runs of each arm.
        out: folder of the clips, the cache, the runs and their results; the same folder resumes the experiment.
        settings: of every training.
        num_samples: how many samples each share is taken of.

    Raises:
        ConfigError: the folder's results were made with other weights or settings.
    """
    # The measured clips are others, so that all of the lesson's can be trained on.
    settings = ("train.validation_clips=0", *settings)
    results, config = out / f"{what}.json", load_config("toy_lora", list(settings))
    made_with = {
        "settings": flat_settings(config),
        "base": WeightsFolder(weights_paths(config)).base_identity(),
        "num_samples": num_samples,
    }
    earlier = read_json(results) if results.exists() else {"made_with": made_with, "rows": []}
    if earlier.get("made_with") != made_with:
        raise ConfigError(f"{results} was made with other weights or settings: use another out=, or remove it.")
    rows = earlier["rows"]
    fps = DRAWN_AT.get(what, FPS)
    videos = out / ("videos" if fps == FPS else f"videos_{fps}_fps")
    if not videos.exists():
        write_lesson(videos, 1, fps)
    for seed in range(num_seeds):
        for arm, own in arms()[what].items():
            if any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
                continue
            run_dir = out / what / f"{arm.replace(' ', '_')}_seed_{seed}"
            tqdm.write(f"\n{what}: {arm}, seed {seed}")
            # Arms that cut the clips in another way have caches of their own.
            cuts = [setting for setting in own if setting.startswith("data.")]
            paths = [f"data.videos={videos}", f"data.cache={out / (f'cache_{arm}' if cuts else 'cache')}"]
            # In this process, which has imported everything already.
            if code := prepare(load_config("toy_lora", [*paths, *cuts])):
                raise MochiTuneError(f"the clips were not encoded, exit code {code}: the same command goes on.")
            if code := train(load_config("toy_lora", [*paths, *settings, *own, f"seed={seed}", f"run_dir={run_dir}"])):
                raise MochiTuneError(f"{run_dir} ended with exit code {code}: the same command goes on from there.")
            adapter = load_adapter(run_dir / "adapter.safetensors")
            rows.append({"arm": arm, "seed": seed, **measure(adapter, seed, num_samples)})
            write_json(results, {"what": what, "made_with": made_with, "rows": rows})
    return table(arms()[what], [row for row in rows if row["seed"] < num_seeds])


def arms() -> dict[str, dict[str, list[str]]]:
    """Returns the experiments: what is compared -> name of the arm -> its settings."""
    shapes = linear_shapes(WeightsFolder(weights_paths(load_config("toy_lora", []))).dit_skeleton())
    wide, narrow = (load_config("toy_lora", [f"lora={name}"]).lora for name in ("attention_mlp", "attention"))
    size, small = (sum(sum(shapes[n]) for n in select_layers(shapes, lora.targets)) for lora in (wide, narrow))
    # As many parameters in fewer layers: a higher rank.
    rank = round(wide.rank * size / small)
    return {
        "objective": {name: [f"train.objective={name}"] for name in ("sampler", "official", "unnormalised")},
        "precision": {name: ["model.dtype=bf16", f"model.precision={name}"] for name in ("bf16", "fp8", "int8", "nf4")},
        "layers": {
            f"attention rank {rank}": ["lora=attention", f"lora.rank={rank}", f"lora.alpha={2 * rank}"],
            f"attention and MLP rank {wide.rank}": ["lora=attention_mlp"],
        },
        "frame_rate": {name: [f"data.frame_rate={name}"] for name in ("retime", "resample")},
    }


def measure(adapter: Adapter, seed: int, num_samples: int) -> dict[str, float]:
    """Measures an adapter, always in the sampler's space: losses on unseen clips, and what its samples show."""
    config = load_config("toy_lora", [])
    weights, settings = WeightsFolder(weights_paths(config)), sampler_settings(config.sample)
    text = weights.load_text_encoder("cpu", torch.float32)
    dit, decoder = weights.load_dit("cpu", torch.float32), weights.load_decoder("cpu", torch.float32)
    apply_adapter(dit, adapter.layers, "lesson")
    new, base = asked_words(num_samples)
    new_frames, base_frames = (render_words(words, dit, text, decoder, settings, seed) for words in (new, base))
    errors = [colour_error(clip, w.colour) for clip, w in zip(new_frames, new, strict=True)]
    return {
        "loss_new": loss_on(new, dit, text, weights),
        "loss_base": loss_on(base, dit, text, weights),
        "new": share_new(new_frames),
        "new_all": share_shown(new_frames, new),
        "base": share_shown(base_frames, base),
        "colour_error": sum(errors) / len(errors),
        "unevenness": unevenness(new_frames),
        "parameters": sum(x.a.numel() + x.b.numel() for x in adapter.layers.values()),
    }


def unevenness(clips: Tensor) -> float:
    """Returns how much the change from frame to frame varies: its deviation over its mean, averaged over the clips.

    Args:
        clips: uint8 (B, F, H, W, 3); a clip that stands still now and then has 0.3 and more.
    """
    changes = clips.float().diff(dim=1).abs().mean(dim=(2, 3, 4))
    return (changes.std(dim=1) / changes.mean(dim=1).clamp(min=1e-6)).mean().item()


@torch.no_grad()
def loss_on(words: list[Words], dit: AsymmDiT, text: TextEncoder, weights: WeightsFolder) -> float:
    """Returns the loss in the sampler's space on clips that were not trained on, at fixed noise and sigmas."""
    encoder = weights.load_encoder("cpu", torch.float32)
    vae_latents, _ = encoder(frames_to_pixels(draw_clips(words, keyed_generator(0, "held-out clips"))))
    embeds = torch.stack(text.encode([w.caption for w in words]))
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
    noise = torch.randn(vae_latents.shape, generator=keyed_generator(0, "held-out noise"))
    losses = []
    for value in tqdm(SIGMAS, desc="held-out loss", leave=False):
        sigma = torch.full((len(words),), value)
        noisy, target = noisy_and_target("sampler", vae_latents, noise, sigma)
        losses.append(velocity_loss(dit(noisy, sigma, embeds, mask), target).mean())
    return torch.stack(losses).mean().item()


def table(names: dict[str, list[str]], rows: list[dict]) -> str:
    """Returns mean and standard deviation over the seeds of each arm as a Markdown table."""
    lines = [f"| arm | parameters | seeds | {' | '.join(COLUMNS.values())} |", "| --- " * (len(COLUMNS) + 3) + "|"]
    for name in names:
        mine = [row for row in rows if row["arm"] == name]
        cells = [name, f"{mine[0]['parameters']:,}", str(len(mine))]
        for column in COLUMNS:
            values = [row[column] for row in mine]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            digits = 4 if column.startswith("loss") else 3
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
