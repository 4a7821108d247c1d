"""Compares ways of training the toy model on the same lesson, with several seeds each."""

import contextlib
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

from mochi_tune.adapters.files import Adapter, load_adapter
from mochi_tune.adapters.lora import apply_adapter
from mochi_tune.config.load import load_config, weights_paths
from mochi_tune.config.settings import flat_settings
from mochi_tune.data_prep.prepare import main as prepare
from mochi_tune.errors import ConfigError, MochiTuneError
from mochi_tune.files import read_json, write_json
from mochi_tune.models.device import find_device
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.models.text_encoder import TextEncoder
from mochi_tune.models.vae import frames_to_pixels
from mochi_tune.recipes.train_lora import main as train
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.toy.arms import DEFAULT, Arm, arms, run_names
from mochi_tune.toy.lesson import asked_words, write_lesson
from mochi_tune.toy.measure import colour_error
from mochi_tune.toy.samples import render_words, share_new, share_shown
from mochi_tune.toy.world import Words, draw_clips
from mochi_tune.training.draws import keyed_generator
from mochi_tune.training.objective import noisy_and_target, velocity_loss
from mochi_tune.weights.folder import WeightsFolder

NUM_SAMPLES = 50
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
# Measured quantities, in the order of the table.
COLUMNS = {
    "loss_new": "loss, new",
    "loss_base": "loss, old",
    "new": "new thing",
    "new_all": "new, all three",
    "base": "old captions",
    "colour_error": "colour error",
    "unevenness": "unevenness",
}


def main(what: str, num_seeds: int, out: Path, *settings: str, num_samples: int = NUM_SAMPLES) -> str:
    """Trains each arm with each seed, unless that is done already, and returns the table as Markdown.

    An arm that several experiments have is trained once.

    Args:
        what: key of `arms()`.
        num_seeds: number of runs of each arm.
        out: folder of clips, caches, runs and results; the same folder resumes the experiment.
        settings: `key=value` settings of all trainings.
        num_samples: number of samples for each share.

    Raises:
        ConfigError: the folder's results were made with other weights or settings.
        SystemExit: a training was stopped; has its exit code.
    """
    # Other clips are measured, so all clips of the lesson can be trained on.
    settings = ("train.validation_clips=0", *settings)
    results, config = out / "results.json", load_config("toy_lora", list(settings))
    made_with = {
        "settings": flat_settings(config),
        "base": WeightsFolder(weights_paths(config)).base_identity(),
        "num_samples": num_samples,
    }
    earlier = read_json(results) if results.exists() else {"made_with": made_with, "rows": []}
    if earlier.get("made_with") != made_with:
        raise ConfigError(f"{results} was made with other weights or settings: use another out=, or remove it.")
    rows, names = earlier["rows"], run_names()
    for seed in range(num_seeds):
        for label, arm in arms()[what].items():
            if any((row["run"], row["seed"]) == (names[arm], seed) for row in rows):
                continue
            tqdm.write(f"\n{what}: {label}, seed {seed}")
            run_dir = train_arm(arm, seed, out, *settings)
            measured = measure(load_adapter(run_dir / "adapter.safetensors"), seed, num_samples, config.device)
            rows.append({"run": names[arm], "seed": seed, **measured})
            write_json(results, {"made_with": made_with, "rows": rows})
    return table(arms()[what], [row for row in rows if row["seed"] < num_seeds])


def train_arm(arm: Arm, seed: int, out: Path, *settings: str) -> Path:
    """Trains an arm in this process, which has imported everything already. Returns the run folder.

    Raises:
        SystemExit: the training was stopped; has its exit code.
    """
    run_dir, data = out / f"{run_names()[arm]}_seed_{seed}", prepare_clips(arm, out)
    config = load_config("toy_lora", [*data, *settings, *arm.settings, f"seed={seed}", f"run_dir={run_dir}"])
    with rounded_to_bf16() if arm.rounds_to_bf16 else contextlib.nullcontext():
        code = train(config)
    if code:
        # Mistakes are exceptions, so a training that was asked to stop is the only one that returns a code.
        tqdm.write(f"{run_dir} was stopped: the same command goes on from there", file=sys.stderr)
        raise SystemExit(code)
    return run_dir


def prepare_clips(arm: Arm, out: Path) -> list[str]:
    """Draws and encodes an arm's clips, unless that is done already. Returns the settings that name them."""
    videos = draw_lesson(arm, out)
    # Arms that cut the clips differently have separate caches.
    cuts = [setting for setting in arm.settings if setting.startswith("data.")]
    cache = out / "_".join(["cache", videos.name, *(setting.partition("=")[2] for setting in cuts)])
    data = [f"data.videos={videos}", f"data.cache={cache}", *cuts]
    if code := prepare(load_config("toy_lora", data)):
        raise MochiTuneError(f"the clips were not encoded, exit code {code}: the same command goes on.")
    return data


def draw_lesson(arm: Arm, out: Path) -> Path:
    """Draws an arm's clips, unless that is done already. Returns their folder."""
    # This must not be the name of an experiment, which is the folder of its runs.
    name = "videos" if arm.num_clips == DEFAULT.num_clips else f"videos_{arm.num_clips}"
    videos = out / (name if arm.fps == DEFAULT.fps else f"{name}_{arm.fps}_fps")
    if not videos.exists():
        unfinished = out / f"{videos.name}.unfinished"
        for video in write_lesson(unfinished, 1, arm.fps, replaces=True)[arm.num_clips :]:
            video.unlink()
            video.with_suffix(".txt").unlink()
        unfinished.rename(videos)
    return videos


@contextlib.contextmanager
def rounded_to_bf16() -> Iterator[None]:
    """Rounds the parameters of all optimizers, and their moments, to bf16 after every step."""

    def round_all(optimizer: torch.optim.Optimizer, *_) -> None:
        moments = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.dim()]
        for tensor in [*moments, *(x for group in optimizer.param_groups for x in group["params"])]:
            tensor.data.copy_(tensor.data.to(torch.bfloat16))

    handle = register_optimizer_step_post_hook(round_all)
    try:
        yield
    finally:
        handle.remove()


def measure(adapter: Adapter, seed: int, num_samples: int, device_name: str = "cpu") -> dict[str, float]:
    """Measures an adapter: its losses on unseen clips, always in the sampler's space, and what its samples show."""
    config, device = load_config("toy_lora", []), find_device(device_name)
    weights, settings = WeightsFolder(weights_paths(config)), sampler_settings(config.sample)
    text = weights.load_text_encoder(device, torch.float32)
    dit, decoder = weights.load_dit(device, torch.float32), weights.load_decoder(device, torch.float32)
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
    """Returns how much the change between frames varies: its standard deviation over its mean, averaged over clips.

    Args:
        clips: uint8 (B, F, H, W, 3). A clip that stands still now and then has 0.3 or more.
    """
    changes = clips.float().diff(dim=1).abs().mean(dim=(2, 3, 4))
    return (changes.std(dim=1) / changes.mean(dim=1).clamp(min=1e-6)).mean().item()


@torch.no_grad()
def loss_on(words: list[Words], dit: AsymmDiT, text: TextEncoder, weights: WeightsFolder) -> float:
    """Returns the loss in the sampler's space on held-out clips, with fixed noise and sigmas."""
    device = next(dit.parameters()).device
    encoder = weights.load_encoder(device, torch.float32)
    clips = draw_clips(words, keyed_generator(0, "held-out clips")).to(device)
    vae_latents, _ = encoder(frames_to_pixels(clips))
    embeds = torch.stack(text.encode([w.caption for w in words]))
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
    noise = torch.randn(vae_latents.shape, generator=keyed_generator(0, "held-out noise")).to(device)
    losses = []
    for value in tqdm(SIGMAS, desc="held-out loss", leave=False):
        sigma = torch.full((len(words),), value, device=device)
        noisy, target = noisy_and_target("sampler", vae_latents, noise, sigma)
        losses.append(velocity_loss(dit(noisy, sigma, embeds, mask), target).mean())
    return torch.stack(losses).mean().item()


def table(compared: dict[str, Arm], rows: Iterable[dict]) -> str:
    """Returns the mean and the standard deviation over the seeds of each arm as a Markdown table."""
    lines = [f"| arm | parameters | seeds | {' | '.join(COLUMNS.values())} |", "| --- " * (len(COLUMNS) + 3) + "|"]
    names, rows = run_names(), list(rows)
    for label, arm in compared.items():
        mine = [row for row in rows if row["run"] == names[arm]]
        cells = [label, f"{mine[0]['parameters']:,}", str(len(mine))]
        for column in COLUMNS:
            values = [row[column] for row in mine]
            digits = 4 if column.startswith("loss") else 3
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
