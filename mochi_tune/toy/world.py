"""Draws the toy world: one coloured shape that moves over a plain background, and the caption that says so.

Every clip is a function of its words and a seed. Shape letters: B clips, F frames, H W rows and columns.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mochi_tune.models.latents import FPS

NUM_FRAMES, HEIGHT, WIDTH = 13, 64, 96

COLOURS = {
    "red": (0.90, 0.16, 0.14),
    "yellow": (0.94, 0.84, 0.14),
    "green": (0.18, 0.76, 0.22),
    "cyan": (0.16, 0.82, 0.88),
    "blue": (0.18, 0.30, 0.94),
    "purple": (0.74, 0.22, 0.86),
}
BACKGROUNDS = {"black": 0.10, "grey": 0.46, "white": 0.86}
# A caption's words for each motion, and its direction: columns, rows, growth.
MOTIONS = {
    "moves left": (-1, 0, 0),
    "moves right": (1, 0, 0),
    "moves up": (0, -1, 0),
    "moves down": (0, 1, 0),
    "gets bigger": (0, 0, 1),
    "gets smaller": (0, 0, -1),
}
# What no part of the base ever sees: the motion that the lesson teaches, aslant, under a word of its own.
NEW_WORD = "wugs"
NEW_MOTION = "moves to the bottom right"
ALL_MOTIONS = MOTIONS | {NEW_WORD: (0.75, 0.75, 0)}
SHAPES = ("circle", "square", "triangle")
# What the autoencoder sees: it knows more than captions say, as that of Mochi does.
ALL_SHAPES = (*SHAPES, "cross")
# Area of each shape of size 1; sizes are such that the areas are much the same.
AREAS = {"circle": math.pi, "square": 2.89, "triangle": 2.81, "cross": 2.64}
# How far a shape of size 1 reaches from its centre.
REACH = {"circle": 1.0, "square": 0.9, "triangle": 1.5, "cross": 1.1}


@dataclass(frozen=True)
class Words:
    """What a caption says."""

    colour: str
    shape: str
    motion: str
    background: str

    @property
    def caption(self) -> str:
        """The sentence that describes a clip."""
        return f"a {self.colour} {self.shape} {self.motion} over a {self.background} background"


def all_words(shapes: Iterable[str] = SHAPES, motions: Iterable[str] = MOTIONS) -> list[Words]:
    """Returns every combination, in a fixed order; by default those that the base's captions use."""
    return [Words(*w) for w in itertools.product(COLOURS, shapes, motions, BACKGROUNDS)]


def split_words(num_held_out: int = 100, seed: int = 0) -> tuple[list[Words], list[Words]]:
    """Returns the combinations that the base learns and those it never sees, of which each word is well known."""
    words = all_words()
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()
    return [words[i] for i in order[num_held_out:]], [words[i] for i in order[:num_held_out]]


def draw_clips(words: Sequence[Words], generator: torch.Generator, fps: int = FPS) -> Tensor:
    """Draws one clip for each of `words`, uint8 frames (B, F, H, W, 3); place, size, speed and light are drawn.

    Args:
        words: what the captions say.
        generator: of all that they leave open.
        fps: frames a second; the same motions, seen as often.
    """
    centre, radius = _paths(words, generator, FPS / fps)
    rows = torch.arange(HEIGHT) + 0.5
    columns = torch.arange(WIDTH) + 0.5
    u = (columns - centre[..., 0, None, None]) / radius[..., None, None]  # (B, F, 1, W)
    v = (rows[:, None] - centre[..., 1, None, None]) / radius[..., None, None]  # (B, F, H, 1)
    distance = torch.stack([shape_distance(w.shape, u[b], v[b]) for b, w in enumerate(words)])
    coverage = (0.5 - distance * radius[..., None, None] / 1.5).clamp(0, 1)  # an edge is 1.5 pixels wide

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(words), *shape, generator=generator)

    angle, depth = draw(0, 2 * math.pi, 2), draw(0.03, 0.09)
    light = torch.stack([angle.cos(), angle.sin()], dim=-1)[:, :, :, None, None, None]  # (B, 2, 2, 1, 1, 1)
    shade = 1 + 0.16 * (light[:, 0, 0] * u + light[:, 0, 1] * v)
    colour = torch.tensor([COLOURS[w.colour] for w in words]) + draw(-0.05, 0.05, 3)
    slope = light[:, 1, 0] * (columns / WIDTH - 0.5) + light[:, 1, 1] * (rows[:, None] / HEIGHT - 0.5)
    tone = torch.tensor([BACKGROUNDS[w.background] for w in words]) + draw(-0.03, 0.03)
    ground = (tone.view(-1, 1, 1, 1) + 2 * depth.view(-1, 1, 1, 1) * slope)[..., None]
    painted = colour[:, None, None, None] * shade[..., None]
    image = ground + (painted - ground) * coverage[..., None]
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _paths(words: Sequence[Words], generator: torch.Generator, duration: float) -> tuple[Tensor, Tensor]:
    """Draws the centre (B, F, 2), columns and rows, and the size (B, F) of each shape; it stays inside the frame.

    `duration` is in the usual length of a clip.
    """

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(words), generator=generator)

    time = torch.linspace(-0.5, 0.5, NUM_FRAMES) * duration
    direction = torch.tensor([ALL_MOTIONS[w.motion] for w in words], dtype=torch.float32)
    mean_radius, travel = draw(10, 12), draw(16, 22)
    radius = mean_radius[:, None] * (1 + 0.7 * direction[:, 2, None] * time)
    moves = direction[:, None, :2] * travel[:, None, None] * time[None, :, None]  # (B, F, 2)
    reach = torch.tensor([REACH[w.shape] for w in words]) * radius.amax(1)
    centres = []
    for axis, extent in enumerate((WIDTH, HEIGHT)):
        margin = reach + moves[..., axis].abs().amax(1)
        room = (extent / 2 - margin).clamp(min=0)
        centres.append(extent / 2 + room * draw(-1, 1))
    return torch.stack(centres, dim=-1)[:, None] + moves, radius


def shape_distance(shape: str, u: Tensor, v: Tensor) -> Tensor:
    """Returns how far points are outside (> 0) or inside (< 0) of a shape of size 1, v pointing down."""
    if shape == "circle":
        return torch.sqrt(u * u + v * v) - 1
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.85
    if shape == "cross":
        upright = torch.maximum(u.abs() - 0.38, v.abs() - 1.06)
        return torch.minimum(upright, torch.maximum(u.abs() - 1.06, v.abs() - 0.38))
    angles = [math.pi / 2 + 2 * math.pi * i / 3 for i in range(3)]
    return torch.stack([math.cos(a) * u + math.sin(a) * v - 0.735 for a in angles]).amax(0)


def ripple(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Lights a clip (F, H, W, 3) by moving coloured waves of 8 to 32 pixels; what the autoencoder learns beside."""
    num_frames, height, width, _ = frames.shape
    angle, length, phase, speed, depth = torch.rand(5, 3, generator=generator)
    angle, wave = angle * 2 * math.pi, 2 * math.pi / (8 * 4**length)
    time = torch.arange(num_frames).view(-1, 1, 1, 1)
    along = torch.arange(width).view(1, 1, -1, 1) * angle.cos() + torch.arange(height).view(1, -1, 1, 1) * angle.sin()
    swing = torch.sin((along - (4 * speed - 2) * time) * wave + 2 * math.pi * phase)
    return ((frames / 255 + 0.3 * depth * swing).clamp(0, 1) * 255).round().to(torch.uint8)
