"""Draws the toy world: one coloured shape that moves over a plain background, and a caption that describes it.

Every clip is a function of its words and a seed. Shape letters: B clips, F frames, H rows, W columns.
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
# Motion as a caption names it -> direction: columns, rows, growth.
MOTIONS = {
    "moves left": (-1, 0, 0),
    "moves right": (1, 0, 0),
    "moves up": (0, -1, 0),
    "moves down": (0, 1, 0),
    "gets bigger": (0, 0, 1),
    "gets smaller": (0, 0, -1),
}
# The diagonal motion that the lesson teaches, and its made-up word. The base model has never seen either.
NEW_WORD = "wugs"
NEW_MOTION = "moves to the bottom right"
ALL_MOTIONS = MOTIONS | {NEW_WORD: (0.75, 0.75, 0)}
SHAPES = ("circle", "square", "triangle")
# The autoencoder is trained on one more shape than captions name: Mochi's knows more than captions, too.
ALL_SHAPES = (*SHAPES, "cross")
# Area of each shape of size 1; the areas are similar.
AREAS = {"circle": math.pi, "square": 2.89, "triangle": 2.81, "cross": 2.64}
# Largest distance of a point of a shape of size 1 from its centre.
REACH = {"circle": 1.0, "square": 0.9, "triangle": 1.5, "cross": 1.1}


@dataclass(frozen=True)
class Words:
    """The words of a caption."""

    colour: str
    shape: str
    motion: str
    background: str

    @property
    def caption(self) -> str:
        """The sentence that describes a clip."""
        return f"a {self.colour} {self.shape} {self.motion} over a {self.background} background"


def all_words(shapes: Iterable[str] = SHAPES, motions: Iterable[str] = MOTIONS) -> list[Words]:
    """Returns all combinations in a fixed order; the defaults are those of the base model's captions."""
    return [Words(*w) for w in itertools.product(COLOURS, shapes, motions, BACKGROUNDS)]


def split_words(num_held_out: int = 100, seed: int = 0) -> tuple[list[Words], list[Words]]:
    """Returns the combinations that the base model trains on, and held-out ones of the same words."""
    words = all_words()
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()
    return [words[i] for i in order[num_held_out:]], [words[i] for i in order[:num_held_out]]


def draw_clips(words: Sequence[Words], generator: torch.Generator, fps: int = FPS) -> Tensor:
    """Draws one clip for each of `words`, as uint8 frames (B, F, H, W, 3).

    Args:
        words: contents of the clips.
        generator: draws what the words do not say: position, size, speed and light.
        fps: frames per second at which the motions are sampled.
    """
    centre, radius = _paths(words, generator, FPS / fps)
    rows = torch.arange(HEIGHT) + 0.5
    columns = torch.arange(WIDTH) + 0.5
    u = (columns - centre[..., 0, None, None]) / radius[..., None, None]  # (B, F, 1, W)
    v = (rows[:, None] - centre[..., 1, None, None]) / radius[..., None, None]  # (B, F, H, 1)
    distance = torch.stack([shape_distance(w.shape, u[b], v[b]) for b, w in enumerate(words)])
    coverage = (0.5 - distance * radius[..., None, None] / 1.5).clamp(0, 1)  # edges are 1.5 pixels wide

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
    """Draws the centres (B, F, 2), in columns and rows, and the sizes (B, F) of shapes that stay inside the frame.

    `duration` is relative to the usual length of a clip.
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
    """Returns the distance of points to the edge of a shape of size 1, negative inside; v points down."""
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
    """Adds moving coloured waves of 8 to 32 pixels to a clip (F, H, W, 3), as training data of the autoencoder."""
    num_frames, height, width, _ = frames.shape
    angle, length, phase, speed, depth = torch.rand(5, 3, generator=generator)
    angle, wave = angle * 2 * math.pi, 2 * math.pi / (8 * 4**length)
    time = torch.arange(num_frames).view(-1, 1, 1, 1)
    along = torch.arange(width).view(1, 1, -1, 1) * angle.cos() + torch.arange(height).view(1, -1, 1, 1) * angle.sin()
    swing = torch.sin((along - (4 * speed - 2) * time) * wave + 2 * math.pi * phase)
    return ((frames / 255 + 0.3 * depth * swing).clamp(0, 1) * 255).round().to(torch.uint8)
