"""Measures which sampling steps need guidance: renders the same captions with guidance in some of the steps only."""

from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch

from mochi_tune.config.load import load_config, weights_paths
from mochi_tune.files import make_writable_folder, write_json
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.toy.lesson import asked_words
from mochi_tune.toy.samples import render_words, share_shown
from mochi_tune.weights.folder import WeightsFolder

NUM_SAMPLES = 50
# Name -> where guidance begins and ends, as fractions of the steps.
WINDOWS = {
    "all steps": (0.0, 1.0),
    "first three quarters": (0.0, 0.75),
    "last three quarters": (0.25, 1.0),
    "first half": (0.0, 0.5),
    "middle half": (0.25, 0.75),
    "last half": (0.5, 1.0),
    "no step": (0.0, 0.0),
}


def main(num_seeds: int, out: Path, *given: str, num_samples: int = NUM_SAMPLES) -> str:
    """Renders with guidance in each window, writes guidance.json, and returns a Markdown table.

    The column "obeyed" is the share of samples with the colour, shape and motion of the caption. "changed" is the root
    mean square difference from the frames with guidance in all steps, in uint8 levels.
    """
    make_writable_folder(out)
    config = load_config("toy_lora", list(given))
    weights, settings = WeightsFolder(weights_paths(config)), sampler_settings(config.sample)
    assert isinstance(settings.guidance, float)
    text = weights.load_text_encoder("cpu", torch.float32)
    dit, decoder = weights.load_dit("cpu", torch.float32), weights.load_decoder("cpu", torch.float32)
    _, words = asked_words(num_samples)
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in WINDOWS}
    for seed in range(num_seeds):
        whole = None
        for name, window in WINDOWS.items():
            frames = render_words(words, dit, text, decoder, replace(settings, guided=window), seed).float()
            whole = frames if whole is None else whole
            changed = (frames - whole).square().mean().sqrt().item()
            rows[name].append((share_shown(frames.to(torch.uint8), words), changed))
    write_json(out / "guidance.json", rows)
    lines = ["| guidance in | passes | obeyed | changed |", "| --- | --- | --- | --- |"]
    for name, measured in rows.items():
        passes = mean(1 + (scale != 1) for scale in replace(settings, guided=WINDOWS[name]).scales)
        columns = (with_spread([row[i] for row in measured], digits) for i, digits in ((0, 3), (1, 1)))
        lines.append(f"| {name} | {passes / 2:.0%} | {' | '.join(columns)} |")
    return "\n".join(lines)


def with_spread(values: list[float], digits: int) -> str:
    """Formats the mean and, for two or more values, the standard deviation."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"
