"""Draws the curves of a run for its page: losses, learning rate, seconds and memory of the steps."""

from collections.abc import Mapping, Sequence
from math import floor, isfinite, log10
from typing import TYPE_CHECKING, Any

from mochi_tune.errors import counted
from mochi_tune.pages.charts import Line, Mark, line_chart, running_mean
from mochi_tune.pages.html_page import section
from mochi_tune.training.metrics import comparable

if TYPE_CHECKING:
    from mochi_tune.training.report import RunFiles

# Label of validation losses that are not compared with the last one.
OTHERS = "earlier: other clips, captions or noise"


def draw_curves(run: "RunFiles") -> str:
    """Returns the section with the charts of a run."""
    losses, seconds = run.curve("loss"), run.curve("seconds")
    if not losses:
        return section("Curves", "They begin with the first step.", "")
    window = mean_window(losses)
    drawn = [
        line_chart("Training loss", _raw_and_smooth(losses, window), "step", "mean squared error", _usual_range(losses))
    ]
    if run.validations and run.best is not None:
        mark, lines = Mark(f"best: step {run.best[0]}", run.best), _validation_losses(run.validations)
        drawn.append(line_chart("Validation loss", lines, "step", "mean squared error", mark=mark))
        if lines := _by_noise_level(comparable(run.validations)):
            drawn.append(line_chart("Validation loss by noise level", lines, "step", "mean squared error"))
    rates = run.curve("lr")
    power = floor(log10(highest)) if (highest := max((rate for _, rate in rates), default=0)) > 0 else 0
    rates = [(step, rate / 10**power) for step, rate in rates]
    drawn.append(line_chart("Learning rate", [Line("of the optimizer", "accent", rates)], "step", f"× 1e{power}"))
    drawn.append(
        line_chart("Seconds a step", _raw_and_smooth(seconds, window), "step", "seconds", _usual_range(seconds))
    )
    if memory := run.curve("memory_gib"):
        drawn.append(line_chart("Memory", [Line("most of each step", "accent", memory)], "step", "GiB of the GPU"))
    note = "The loss of one step depends mostly on the noise that it drew. Validation has the same noise every time."
    return section("Curves", note, f'<div class="charts">{"".join(drawn)}</div>')


def _raw_and_smooth(points: list[tuple[int, float]], window: int) -> list[Line]:
    if window == 1:
        return [Line("each step", "accent", points)]
    smooth = Line(f"mean of {counted(window, 'step')}", "accent", running_mean(points, window))
    return [Line("each step", "thin", points), smooth]


def mean_window(points: Sequence) -> int:
    """Returns how many of the last steps a mean includes: a tenth of them, at most 100."""
    return max(1, min(100, len(points) // 10))


def _usual_range(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Returns the range without the lowest and highest hundredth, so that a spike does not flatten the curve."""
    values = sorted(value for _, value in points)
    out = len(values) // 100 or int(len(values) >= 20)
    return values[out], values[-1 - out]


def _validation_losses(validations: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Returns a line of the losses that can be compared with the last one, and thin ones of earlier clips or noise."""
    own, others = comparable(validations), {}
    steps = {row["step"] for row in own}
    for row in validations:
        if row["step"] not in steps:
            others.setdefault(row.get("measured_on"), []).append(row)
    parts = [(OTHERS, "thin", rows) for rows in others.values()] + [("all noise levels", "accent", own)]
    return [Line(label, style, [(row["step"], row["validation_loss"]) for row in rows]) for label, style, rows in parts]


def _by_noise_level(validations: Sequence[Mapping[str, Any]]) -> list[Line]:
    levels = list(dict.fromkeys(level for row in validations for level in row.get("bins", {})))
    styles = ("accent", "level1", "level2", "level3")
    lines = []
    for style, level in zip(styles, levels, strict=False):
        points = [(row["step"], row["bins"][level]) for row in validations if level in row.get("bins", {})]
        lines.append(Line(f"σ {level}", style, [(step, loss) for step, loss in points if isfinite(loss)]))
    return [line for line in lines if line.points]
