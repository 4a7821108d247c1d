"""The lesson: clips that teach a new motion and its word, and the captions that a trained model is tested with."""

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from mochi_tune.errors import ConfigError, MochiTuneError
from mochi_tune.files import write_atomic
from mochi_tune.models.latents import FPS
from mochi_tune.sampling.video import write_video
from mochi_tune.toy.world import BACKGROUNDS, COLOURS, NEW_WORD, SHAPES, Words, all_words, draw_clips, split_words
from mochi_tune.training.draws import keyed_generator

NUM_CLIPS = 24
# Precedes a command in the log.
PROMPT = "$ "


def lesson_words() -> tuple[list[Words], list[Words]]:
    """Returns the words of the lesson's clips, and all other combinations with the new motion, shuffled."""
    colours, shapes, backgrounds = list(COLOURS), list(SHAPES), list(BACKGROUNDS)
    taught = []
    for i in range(NUM_CLIPS):
        turn, colour = divmod(i, 6)
        background = backgrounds[(colour // 2 + turn + turn // 3) % 3]
        taught.append(Words(colours[colour], shapes[(colour + turn) % 3], NEW_WORD, background))
    others = [words for words in all_words(motions=(NEW_WORD,)) if words not in taught]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0)).tolist()
    return taught, [others[i] for i in order]


def asked_words(count: int) -> tuple[list[Words], list[Words]]:
    """Returns `count` words with the new motion and `count` held-out words with old ones.

    The former are not in the lesson, and repeat if there are too few.
    """
    _, others = lesson_words()
    return [others[i % len(others)] for i in range(count)], split_words()[1][:count]


def write_lesson(folder: Path, seed: int, fps: int = FPS, replaces: bool = False) -> list[Path]:
    """Draws the lesson's clips as NAME.mp4, each with its caption in NAME.txt, and returns the videos.

    Args:
        folder: folder to write to, which is created.
        seed: seed of position, size, speed and light.
        fps: frames per second.
        replaces: whether existing files are replaced, such as those of an unfinished folder.

    Raises:
        ConfigError: one of the files exists.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taught, _ = lesson_words()
    names = ("_".join((w.colour, w.shape, *w.motion.split(), w.background)) for w in taught)
    videos = [folder / f"{name}.mp4" for name in names]
    there = [path for video in videos for path in (video, video.with_suffix(".txt")) if os.path.lexists(path)]
    if there and not replaces:
        advice = f": use the clips of {folder} as they are, or another out=."
        if len(there) < 2 * len(videos):
            # Drawing was interrupted, or other files have these names.
            lacks = f"{2 * len(videos) - len(there)} of {2 * len(videos)} files"
            advice = f", and {folder} is incomplete, it lacks {lacks}: use another out=, or remove that folder."
        raise ConfigError(f"{there[0]} exists already{advice}")
    drawn = draw_clips(taught, keyed_generator(seed, "lesson"), fps)
    for video, words, frames in zip(videos, taught, drawn, strict=True):
        write_video(video, [frames], fps=fps)
        write_atomic(video.with_suffix(".txt"), f"{words.caption}\n".encode())
    return videos


def run_verb(*arguments: str, log: Path, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Runs one command as a user would, and appends the command and its output to a log.

    Args:
        arguments: arguments of `mochi-tune`.
        log: log file; its folder exists.
        meanwhile: called about twice a second while the command runs.

    Raises:
        MochiTuneError: the command failed.
    """
    with open(log, "a") as file:
        file.write(f"{PROMPT}mochi-tune {shlex.join(arguments)}\n")
        file.flush()
        command = [sys.executable, "-m", "mochi_tune.cli", *arguments]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                meanwhile()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode:
        said = log.read_text(errors="replace").strip().splitlines()[-1]
        raise MochiTuneError(
            f"`mochi-tune {arguments[0]}` ended with exit code {process.returncode} ({said}): {log} has all of it."
        )
