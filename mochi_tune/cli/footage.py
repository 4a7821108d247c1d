"""The verbs `split` and `filter`: cut footage into clips, and find clips that are not worth a caption."""

import math
from dataclasses import replace
from typing import Any

from mochi_tune.cli.options import FILTER_OPTIONS, SPLIT_OPTIONS, plain_options
from mochi_tune.cli.values import number, positive_number, true_or_false, user_path, whole_number
from mochi_tune.errors import ConfigError


def run_split(arguments: list[str]) -> int:
    """Cuts footage into one clip per scene; returns 1 if a film or a clip was refused."""
    options = plain_options("split", arguments, SPLIT_OPTIONS)
    if options is None:
        return 0
    from mochi_tune.data_prep.scenes import DEFAULT_THRESHOLDS, DETECTORS, SceneRules
    from mochi_tune.data_prep.split import Split
    from mochi_tune.data_prep.split import main as split

    detector: Any = options["detector"]
    if detector not in DETECTORS:
        raise ConfigError(f"detector={detector} is not possible: use {' or '.join(DETECTORS)}.")
    text = options["threshold"]
    rules = SceneRules(
        detector,
        positive_number("threshold", text) if text else DEFAULT_THRESHOLDS[detector],
        number("margin_seconds", options["margin_seconds"], 0),
        positive_number("min_seconds", options["min_seconds"]),
        positive_number("max_seconds", options["max_seconds"]),
    )
    crf = whole_number("crf", options["crf"], 0)
    if crf > 51:
        raise ConfigError(f"crf={crf} does not fit: use 0 (lossless) to 51 (worst).")
    timeout_seconds = positive_number("timeout_seconds", options["timeout_seconds"])
    return split(Split(user_path(options["in"]), user_path(options["out"]), rules, crf, timeout_seconds))


def run_filter(arguments: list[str]) -> int:
    """Measures clips and flags those not worth a caption; returns 1 if one could not be read or moved."""
    options = plain_options("filter", arguments, FILTER_OPTIONS)
    if options is None:
        return 0
    from mochi_tune.data_prep.filter import Filter, FilterLimits, undo
    from mochi_tune.data_prep.filter import main as filter_clips

    def limit(key: str, highest: float) -> float | None:
        return None if options[key] == "off" else number(key, options[key], 0, highest)

    limits = FilterLimits(
        limit("max_black", 1),
        limit("max_frozen", 1),
        limit("min_sharpness", math.inf),
        limit("min_motion", 255),
        limit("max_border", math.inf),
        limit("duplicate_distance", 1),
    )
    out = user_path(options["out"]) if options["out"] else None
    timeout_seconds = positive_number("timeout_seconds", options["timeout_seconds"])
    settings = Filter(user_path(options["videos"]), out, limits, timeout_seconds=timeout_seconds)
    if true_or_false("undo", options["undo"]):
        return undo(settings)
    move = options["move"]
    if move not in ("true", "false") and move.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0"):
        raise ConfigError(f"move={move} is not possible: use true, false or a folder, such as ./{move}.")
    if move not in ("", "false"):
        folder = settings.report / "moved" if move == "true" else user_path(move)
        settings = replace(settings, move=folder)
    return filter_clips(settings)
