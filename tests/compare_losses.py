"""Says whether two runs computed the same losses.

    python tests/compare_losses.py A B [--tolerance X]

A and B are run folders, metrics.jsonl files, or lists of rows such as tests/golden/toy_losses.json. Compared are step,
loss, grad_norm, lr, clips and sigmas of every step, bit for bit; with --tolerance, numbers may differ by that share of
the larger one, to compare runs of different machines. Exit code 0: equal. Exit code 1: they differ, and how.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FIELDS = ("step", "loss", "grad_norm", "lr", "clips", "sigmas")


@dataclass(frozen=True)
class Comparison:
    """How two runs differ.

    Attributes:
        num_steps: steps that were compared.
        first: the first difference that is not allowed, None if there is none.
        max_absolute: largest absolute difference of two numbers, allowed or not.
        max_relative: largest difference of two numbers as a share of the larger one, allowed or not.
    """

    num_steps: int
    first: str | None
    max_absolute: float
    max_relative: float

    def __str__(self) -> str:
        largest = f"largest difference: {self.max_absolute:.3g} absolute, {self.max_relative:.3g} relative"
        if self.first is not None:
            return f"different: {self.first}; {largest}"
        return f"equal: {self.num_steps} steps" + (f"; {largest}" if self.max_absolute else ", bit for bit")


def load_rows(path: Path) -> list[dict]:
    """Reads the rows of a run folder, of a metrics.jsonl file, or of a .json file that holds a list of them."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def compare(rows_a: list[dict], rows_b: list[dict], tolerance: float = 0.0) -> Comparison:
    """Compares two runs step by step.

    Args:
        rows_a: rows of the metrics of one run.
        rows_b: rows of the other.
        tolerance: how far two numbers may differ, as a share of the larger one; 0: not by a bit.
    """
    first, max_absolute, max_relative = None, 0.0, 0.0
    for row_a, row_b in zip(rows_a, rows_b, strict=False):
        for name, a, b in _pairs(row_a, row_b):
            absolute, relative = _differences(a, b)
            max_absolute, max_relative = max(max_absolute, absolute), max(max_relative, relative)
            if relative > tolerance and first is None:
                first = f"step {row_a['step']}: {name} is {a!r} and {b!r}"
    if first is None and (len(rows_a) != len(rows_b) or not rows_a):
        first = f"one has {len(rows_a)} steps and the other {len(rows_b)}"
    return Comparison(min(len(rows_a), len(rows_b)), first, max_absolute, max_relative)


def _pairs(row_a: dict, row_b: dict) -> Iterator[tuple[str, object, object]]:
    """Yields the values of two rows that must agree, each with its name."""
    for name in FIELDS:
        a, b = row_a.get(name), row_b.get(name)
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            yield from ((f"{name}[{i}]", *both) for i, both in enumerate(zip(a, b, strict=True)))
        else:
            yield name, a, b


def _differences(a: object, b: object) -> tuple[float, float]:
    """Returns the absolute and the relative difference of two values; infinite if no number tells how they differ."""
    if a == b:
        return 0.0, 0.0
    if not (isinstance(a, float) and isinstance(b, float)):
        return math.inf, math.inf
    if math.isnan(a) and math.isnan(b):
        return 0.0, 0.0
    absolute = abs(a - b)
    # Two infinities of one sign are equal, above; any other number that is not finite is infinitely far off.
    return (absolute, absolute / max(abs(a), abs(b))) if math.isfinite(absolute) else (math.inf, math.inf)


def main(arguments: list[str]) -> int:
    """Compares two runs and prints how; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("a", type=Path, help="run folder, metrics.jsonl or .json list of rows")
    parser.add_argument("b", type=Path, help="the same of the other run")
    parser.add_argument("--tolerance", type=float, default=0.0, help="allowed difference, as a share of the larger one")
    options = parser.parse_args(arguments)
    found = compare(load_rows(options.a), load_rows(options.b), options.tolerance)
    sys.stdout.write(f"{found}\n")
    return 0 if found.first is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
