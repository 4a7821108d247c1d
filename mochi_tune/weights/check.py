"""`weights check`: what is there of each part, and what each verb lacks; nothing but headers is read."""

from dataclasses import dataclass

from mochi_tune.errors import CheckpointError
from mochi_tune.weights.folder import WeightsFolder
from mochi_tune.weights.paths import PART_NAMES

# The parts that each verb reads.
VERBS = {
    "prepare": ("encoder", "text_encoder"),
    "train": ("dit",),
    "train with eval videos": ("dit", "decoder", "text_encoder"),
    "sample": ("dit", "decoder", "text_encoder"),
}


@dataclass(frozen=True)
class WeightsReport:
    """What was found.

    Attributes:
        parts: a line on each part: what it is, or what is wrong with it.
        verbs: a line on each verb: ready, or what it lacks.
        is_complete: whether every verb is ready.
    """

    parts: list[str]
    verbs: list[str]
    is_complete: bool


def check_weights(weights: WeightsFolder) -> WeightsReport:
    """Checks all parts tensor by tensor, each by itself, so that one's trouble does not hide another's."""
    found, problems = {}, {}
    for part in PART_NAMES:
        try:
            weights.check([part])
            found[part] = weights.describe(part)
        except CheckpointError as error:
            problems[part] = " ".join(str(error).split())
    if not problems:
        try:
            weights.check(list(PART_NAMES))
        except CheckpointError as error:
            problems["text_encoder"] = str(error)
    parts = [f"{name}: {problems.get(part) or found[part]}" for part, name in PART_NAMES.items()]
    verbs = []
    for verb, needed in VERBS.items():
        lacking = [PART_NAMES[part] for part in needed if part in problems]
        verbs.append(f"{verb}: lacks {', '.join(lacking)}" if lacking else f"{verb}: ready")
    return WeightsReport(parts, verbs, not problems)
