"""Detects colour, shape, motion and background of a clip by image arithmetic.

It knows what the world can draw, but no captions and no models, so it can check whether a caption was obeyed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mochi_tune.toy.world import ALL_MOTIONS, ALL_SHAPES, AREAS, BACKGROUNDS, COLOURS, Words, shape_distance

# Colourfulness (largest minus smallest of red, green, blue in [0, 1]) that the frame's most colourful pixels must
# have, and the share of theirs that a pixel must have to belong to the shape.
MIN_CHROMA, MASK_SHARE = 0.3, 0.22
# Share of the frame that a shape may fill.
MAX_AREA = 0.4
# Mean overlap, intersection over union, with the outline of the shape that is named.
MIN_OVERLAP = 0.7
# From the first to the last frame: pixels that something moves, and the logarithm of how often its area grows.
MIN_TRAVEL, MIN_GROWTH = 7.0, 0.6


@dataclass(frozen=True)
class Seen:
    """What is seen in a clip; None where it is nothing that the world can draw."""

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None

    def shows(self, words: Words) -> bool:
        """Whether colour, shape and motion, all three, are those of the words."""
        return (self.colour, self.shape, self.motion) == (words.colour, words.shape, words.motion)


def see(frames: Tensor) -> Seen:
    """Reads a clip, uint8 frames (F, H, W, 3)."""
    image = frames.float() / 255
    chroma, most, mask = _shape_mask(image)
    background = _background(image, chroma < 0.1)
    if most.min() < MIN_CHROMA:
        return Seen(None, None, None, background)
    area, centre = _place(mask)
    rows = torch.arange(image.shape[1]) + 0.5
    columns = torch.arange(image.shape[2]) + 0.5
    u = columns - centre[:, 0, None, None]  # (F, 1, W)
    v = rows[:, None] - centre[:, 1, None, None]  # (F, H, 1)
    colour = _colour(image[chroma > 0.6 * most.view(-1, 1, 1)].mean(0))
    return Seen(colour, _shape(mask, area, u, v), _motion(centre, area), background)


def track(frames: Tensor) -> Tensor:
    """Returns where the shape's centre is, columns and rows in pixels (N, 2), in each of the frames that show one."""
    _, most, mask = _shape_mask(frames.float() / 255)
    return _place(mask)[1][most >= MIN_CHROMA]


def _shape_mask(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the colourfulness (F, H, W), how colourful each frame's most colourful pixels are, and the shape."""
    chroma = image.amax(-1) - image.amin(-1)
    most = chroma.flatten(1).quantile(0.99, dim=1)
    return chroma, most, chroma > MASK_SHARE * most.view(-1, 1, 1)


def _place(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns area (F,) and centre (F, 2), columns and rows, of a mask (F, H, W)."""
    rows = torch.arange(mask.shape[1]) + 0.5
    columns = torch.arange(mask.shape[2]) + 0.5
    area = mask.flatten(1).sum(1).float()
    return area, torch.stack([(mask.sum(1) * columns).sum(1), (mask.sum(2) * rows).sum(1)], dim=1) / area[:, None]


def colour_error(frames: Tensor, colour: str) -> float:
    """Returns how far, root mean square over red, green, blue in [0, 1], what is seen is from a colour's paint."""
    image = frames.float() / 255
    chroma = image.amax(-1) - image.amin(-1)
    most = chroma.flatten(1).quantile(0.99, dim=1).view(-1, 1, 1)
    seen = image[chroma >= 0.6 * most].mean(0)
    return (seen - torch.tensor(COLOURS[colour])).square().mean().sqrt().item()


def _colour(rgb: Tensor) -> str | None:
    """The paint whose hue is nearest; a hue is a direction away from grey."""
    paints = torch.tensor(list(COLOURS.values()))
    directions = torch.nn.functional.normalize(paints - paints.mean(1, keepdim=True), dim=1)
    likeness = directions @ torch.nn.functional.normalize(rgb - rgb.mean(), dim=0)
    return list(COLOURS)[int(likeness.argmax())] if likeness.max() > 0.85 else None


def _shape(mask: Tensor, area: Tensor, u: Tensor, v: Tensor) -> str | None:
    """The shape whose outline, at the mask's place and area, overlaps the mask most."""
    if area.max() > MAX_AREA * mask[0].numel():
        return None
    overlaps = {}
    for shape in ALL_SHAPES:
        radius = (area / AREAS[shape]).sqrt().view(-1, 1, 1)
        outline = shape_distance(shape, u / radius, v / radius) < 0
        overlap = (outline & mask).flatten(1).sum(1) / (outline | mask).flatten(1).sum(1)
        overlaps[shape] = overlap.mean().item()
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= MIN_OVERLAP else None


def _motion(centre: Tensor, area: Tensor) -> str | None:
    """The motion of a straight line fitted through the frames; None where it is little or of two kinds."""
    time = torch.linspace(-0.5, 0.5, len(area))
    across, down, growth = (
        (time @ values / time.square().sum()).item() for values in (centre[:, 0], centre[:, 1], area.log())
    )
    travel = max(abs(across), abs(down))
    if (abs(growth) >= MIN_GROWTH) == (travel >= MIN_TRAVEL):
        return None
    if travel < MIN_TRAVEL:
        found = (0, 0, _sign(growth))
    else:
        # Of a path along an axis, the other axis has little.
        found = (*(_sign(moved) if abs(moved) > travel / 2 else 0 for moved in (across, down)), 0)
    return next((name for name, way in ALL_MOTIONS.items() if tuple(map(_sign, way)) == found), None)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _background(image: Tensor, plain: Tensor) -> str | None:
    """The background whose tone is nearest to the median of the grey pixels."""
    if not plain.any():
        return None
    tone = image[plain].mean(1).median()
    return min(BACKGROUNDS, key=lambda name: abs(BACKGROUNDS[name] - tone))
