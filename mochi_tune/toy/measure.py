"""Detects colour, shape, motion and background of a clip by image arithmetic.

It uses no captions and no models, so it can check whether a caption was obeyed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mochi_tune.toy.world import ALL_MOTIONS, ALL_SHAPES, AREAS, BACKGROUNDS, COLOURS, Words, shape_distance

# The chroma of a pixel is the largest minus the smallest of red, green and blue in [0, 1]. MIN_CHROMA is the minimum
# for the most colourful pixels of a frame. Pixels above MASK_SHARE of their chroma belong to the shape.
MIN_CHROMA, MASK_SHARE = 0.3, 0.22
# Maximum share of the frame that a shape fills.
MAX_AREA = 0.4
# Minimum mean intersection over union with the outline of the named shape.
MIN_OVERLAP = 0.7
# Minimum change from the first to the last frame: pixels of travel, and natural logarithm of the ratio of the areas.
MIN_TRAVEL, MIN_GROWTH = 7.0, 0.6


@dataclass(frozen=True)
class Seen:
    """What a clip shows; None for anything that the world cannot draw."""

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None

    def shows(self, words: Words) -> bool:
        """Whether colour, shape and motion are all those of the words."""
        return (self.colour, self.shape, self.motion) == (words.colour, words.shape, words.motion)


def see(frames: Tensor) -> Seen:
    """Detects what a clip shows, uint8 frames (F, H, W, 3)."""
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
    """Returns the centres of the shape, columns and rows in pixels (N, 2), for the N frames that show one."""
    _, most, mask = _shape_mask(frames.float() / 255)
    return _place(mask)[1][most >= MIN_CHROMA]


def _shape_mask(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the chroma (F, H, W), its 99th percentile in each frame (F,), and the mask of the shape (F, H, W)."""
    chroma = image.amax(-1) - image.amin(-1)
    most = chroma.flatten(1).quantile(0.99, dim=1)
    return chroma, most, chroma > MASK_SHARE * most.view(-1, 1, 1)


def _place(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the area (F,) and the centre (F, 2), as column and row, of a mask (F, H, W)."""
    rows = torch.arange(mask.shape[1]) + 0.5
    columns = torch.arange(mask.shape[2]) + 0.5
    area = mask.flatten(1).sum(1).float()
    return area, torch.stack([(mask.sum(1) * columns).sum(1), (mask.sum(2) * rows).sum(1)], dim=1) / area[:, None]


def colour_error(frames: Tensor, colour: str) -> float:
    """Returns the root mean square difference, over red, green, blue in [0, 1], of the shape's colour and `colour`."""
    image = frames.float() / 255
    chroma = image.amax(-1) - image.amin(-1)
    most = chroma.flatten(1).quantile(0.99, dim=1).view(-1, 1, 1)
    seen = image[chroma >= 0.6 * most].mean(0)
    return (seen - torch.tensor(COLOURS[colour])).square().mean().sqrt().item()


def _colour(rgb: Tensor) -> str | None:
    """Returns the colour of the nearest hue, where a hue is a direction away from grey."""
    paints = torch.tensor(list(COLOURS.values()))
    directions = torch.nn.functional.normalize(paints - paints.mean(1, keepdim=True), dim=1)
    likeness = directions @ torch.nn.functional.normalize(rgb - rgb.mean(), dim=0)
    return list(COLOURS)[int(likeness.argmax())] if likeness.max() > 0.85 else None


def _shape(mask: Tensor, area: Tensor, u: Tensor, v: Tensor) -> str | None:
    """Returns the shape whose outline, at the position and area of the mask, overlaps the mask most."""
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
    """Returns the motion of a line fitted to all frames; None if it is too small, or both travel and growth."""
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
        # A path along one axis has little travel along the other.
        found = (*(_sign(moved) if abs(moved) > travel / 2 else 0 for moved in (across, down)), 0)
    return next((name for name, way in ALL_MOTIONS.items() if tuple(map(_sign, way)) == found), None)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _background(image: Tensor, plain: Tensor) -> str | None:
    """Returns the background nearest to the median tone of the grey pixels."""
    if not plain.any():
        return None
    tone = image[plain].mean(1).median()
    return min(BACKGROUNDS, key=lambda name: abs(BACKGROUNDS[name] - tone))
