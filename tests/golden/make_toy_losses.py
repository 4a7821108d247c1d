"""Trains 20 steps of the toy LoRA on drawn clips, and keeps the losses in toy_losses.json.

The file is the record of what training computed before the code was restructured (commit e66307f); a change that is
meant to keep the numbers must not write it anew. To write it where a change of the numbers is wanted:

    OMP_NUM_THREADS=1 python tests/golden/make_toy_losses.py tests/golden/toy_losses.json

The clips go from `draw_clips` to the embedded encoders without a video file between, as video encoders give other
bytes on other processors.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import mochi_tune
from mochi_tune.data.cache_writer import CacheWriter
from mochi_tune.data.rows import CacheSettings, make_row
from mochi_tune.models.vae import frames_to_pixels
from mochi_tune.toy.lesson import lesson_words
from mochi_tune.toy.world import HEIGHT, NUM_FRAMES, WIDTH, draw_clips
from mochi_tune.weights.folder import WeightsFolder

TOY = Path(mochi_tune.__file__).parent / "assets" / "toy"
NUM_CLIPS, NUM_STEPS = 8, 20
# A short warm-up, so that most steps are taken at a high learning rate; stratified sigmas cover all noise levels.
SETTINGS = (
    f"train.steps={NUM_STEPS}", "train.warmup_steps=4", "train.batch_size=2", "train.accumulation_steps=2",
    "train.sigma_stratified=true", "train.validate_every=0", "train.checkpoint_every=0",
)  # fmt: skip
# What a step is and what it gave. `seconds` differs each time.
FIELDS = ("step", "loss", "grad_norm", "lr", "clips", "sigmas")


def write_cache(folder: Path) -> None:
    """Writes a cache of the first clips of the toy lesson, as `prepare` would."""
    words = lesson_words()[0][:NUM_CLIPS]
    frames = draw_clips(words, torch.Generator().manual_seed(1))
    weights, text_encoder = WeightsFolder(TOY), WeightsFolder(TOY).load_text_encoder("cpu", torch.float32)
    encoder = weights.load_encoder("cpu", torch.float32)
    settings = CacheSettings(
        transform={"version": 1, "buckets": {"": [[NUM_FRAMES, HEIGHT, WIDTH]]}},
        vae=weights.fingerprint("encoder"),
        vae_dtype="fp32",
        t5=weights.fingerprint("text_encoder"),
        t5_dtype="fp32",
    )
    rows = []
    with CacheWriter(folder) as writer:
        for number, (clip, clip_words) in enumerate(zip(frames, words, strict=True)):
            source = hashlib.sha256(clip.numpy().tobytes()).hexdigest()
            cut = {"start": 0, "num_frames": NUM_FRAMES, "height": HEIGHT, "width": WIDTH}
            row = make_row(f"clip_{number}.mp4", [clip_words.caption], source, cut, settings)
            with torch.no_grad():
                mean, logvar = encoder(frames_to_pixels(clip[None]))
            embeds = text_encoder.encode([clip_words.caption])[0]
            writer.put_latents(row.clip_key, mean[0], logvar[0], {})
            writer.put_text(row.text_keys[0], embeds, len(embeds))
            rows.append(row)
        writer.commit(rows, settings)


def run_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "mochi_tune.cli", *arguments], cwd=cwd, check=False)


def train(folder: Path, run: Callable[..., subprocess.CompletedProcess] = run_command) -> list[dict]:
    """Trains by the command line on a cache in `folder`; returns the rows of the run's metrics."""
    write_cache(folder / "cache")
    # In a folder that has no conf/ of its own, so that conf=toy_lora is the packaged one.
    run("train", "conf=toy_lora", "data.cache=cache", "run_dir=run", *SETTINGS, cwd=folder).check_returncode()
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in FIELDS} for row in rows]


def main(out: Path) -> None:
    """Trains, and writes the rows to `out`, one a line."""
    with tempfile.TemporaryDirectory() as folder:
        rows = train(Path(folder))
    out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
