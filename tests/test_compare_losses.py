"""Losses are those that were kept, and the tool that compares runs tells every difference."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from compare_losses import compare, load_rows
from golden.make_toy_losses import train
from helpers_process import run

GOLDEN = Path(__file__).parent / "golden" / "toy_losses.json"
# How far rounding may move a number, as a share of it. `mochi-tune verify` allows an fp32 output an error of 2e-5; the
# loss is a mean of squares and takes twice that: 4e-5. It allows gradients 1e-4, which their norm takes over and, by
# way of the updates, the losses of later steps. Measured between AVX-512, AVX2 and SSE4 kernels: at most 1.2e-6. A
# wrong sign, latent space or posterior moves the numbers by 8e-2 and more.
TOLERANCE = 1e-4


def test_the_toy_losses_are_those_that_were_kept(tmp_path):
    found = compare(load_rows(GOLDEN), train(tmp_path, run), TOLERANCE)
    assert found.first is None and found.num_steps == 20, str(found)


ROWS = [
    {"step": step, "loss": 0.5 / step, "grad_norm": 0.25, "lr": 1e-3, "clips": ["a", "b"], "sigmas": [0.1, 0.9]}
    for step in (1, 2, 3)
]


def run_folder(path: Path, rows: list[dict]) -> Path:
    path.mkdir()
    lines = [json.dumps({**row, "seconds": 0.01 * i}) + "\n" for i, row in enumerate(rows)]
    (path / "metrics.jsonl").write_text("".join(lines))
    return path


def compare_by_command(*arguments: object) -> tuple[int, str]:
    script = Path(__file__).parent / "compare_losses.py"
    done = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def test_equal_runs_are_equal_whatever_they_are_kept_in(tmp_path):
    a, b = run_folder(tmp_path / "a", ROWS), tmp_path / "b.json"
    b.write_text(json.dumps(ROWS))
    assert compare_by_command(a, b) == (0, "equal: 3 steps, bit for bit\n")
    assert compare_by_command(a / "metrics.jsonl", a)[0] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", 4),
        ("loss", math.nextafter(0.25, 1)),
        ("loss", math.nan),
        ("grad_norm", math.inf),
        ("lr", 1.0001e-3),
        ("clips", ["b", "a"]),
        ("clips", ["a"]),
        ("sigmas", [0.1, 0.8]),
        ("sigmas", None),
    ],
)
def test_any_other_value_is_a_difference(name, value):
    rows = copy.deepcopy(ROWS)
    rows[1][name] = value
    for found in (compare(ROWS, rows), compare(rows, ROWS)):
        assert name in found.first and found.max_absolute > 0 and found.max_relative > 0


def test_the_first_and_the_largest_difference_are_reported(tmp_path):
    rows = copy.deepcopy(ROWS)
    rows[1]["loss"], rows[2]["grad_norm"] = 0.26, 0.5
    code, text = compare_by_command(run_folder(tmp_path / "a", ROWS), run_folder(tmp_path / "b", rows))
    assert code == 1
    assert text == "different: step 2: loss is 0.25 and 0.26; largest difference: 0.25 absolute, 0.5 relative\n"


def test_a_run_that_is_shorter_is_different():
    assert compare(ROWS, ROWS[:2]).first == "one has 3 steps and the other 2"
    assert compare([], ROWS).first and compare(ROWS[1:], ROWS).first
    assert compare([], []).first == "one has 0 steps and the other 0"


def test_a_tolerance_allows_rounding_and_no_more(tmp_path):
    rows = copy.deepcopy(ROWS)
    rows[1]["loss"] *= 1 + 1e-6
    a, b = run_folder(tmp_path / "a", ROWS), run_folder(tmp_path / "b", rows)
    code, text = compare_by_command(a, b, "--tolerance", 1e-5)
    assert code == 0 and text.startswith("equal: 3 steps; largest difference: 2.5e-07 absolute, 1e-06 relative")
    assert compare_by_command(a, b, "--tolerance", 1e-7)[0] == 1
    rows[1]["clips"] = ["a", "c"]
    assert compare(ROWS, rows, tolerance=1e9).first == "step 2: clips[1] is 'b' and 'c'"
