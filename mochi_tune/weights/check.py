"""`weights check`: which parts are there and which the verbs lack; reads only headers."""

from dataclasses import dataclass

from mochi_tune.errors import CheckpointError
from mochi_tune.weights.folder import WeightsFolder
from mochi_tune.weights.paths import PART_NAMES

# Parts that each verb reads.
_VERBS = {
    "prepare": ("encoder", "text_encoder"),
    "train": ("dit",),
    "train with eval videos": ("dit", "decoder", "text_encoder"),
    "sample": ("dit", "decoder", "text_encoder"),
}


@dataclass(frozen=True)
class WeightsReport:
    """Result of a check.

    Attributes:
        parts: one line per part that describes it or its problem.
        verbs: one line per verb: ready, or the parts that it lacks.
        is_complete: whether every verb is ready.
    """

    parts: list[str]
    verbs: list[str]
    is_complete: bool


def check_weights(weights: WeightsFolder) -> WeightsReport:
    """Checks the tensors of each part separately, so that a problem of one does not hide those of others."""
    found, problems = {}, {}
    for part in PART_NAMES:
        try:
            weights.check([part])
            found[part] = weights.describe(part)
        except CheckpointError as error:
            problems[part] = str(error)
    if not problems:
        try:
            weights.check(list(PART_NAMES))
        except CheckpointError as error:
            problems["text_encoder"] = str(error)
    parts = [f"{name}: {problems.get(part) or found[part]}" for part, name in PART_NAMES.items()]
    verbs = []
    for verb, needed in _VERBS.items():
        lacking = [PART_NAMES[part] for part in needed if part in problems]
        verbs.append(f"{verb}: lacks {', '.join(lacking)}" if lacking else f"{verb}: ready")
    return WeightsReport(parts, verbs, not problems)
