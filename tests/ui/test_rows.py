"""Rows of a file that grows or is rewritten, while several threads read it."""

import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from mochi_tune.ui import rows
from mochi_tune.ui.rows import RowReader


def text_of(steps, **more):
    return "".join(
        json.dumps({"step": step, "loss": 0.5, "clips": ["a"], "sigmas": [0.1], **more}) + "\n" for step in steps
    )


def test_only_what_was_appended_is_read(tmp_path):
    path, reader = tmp_path / "metrics.jsonl", RowReader()
    assert reader.read(path) == [] == reader.read(tmp_path / "none" / "metrics.jsonl")
    path.write_text(text_of(range(1, 100)) + '{"step": 100, ')
    before = reader.read(path)
    assert [row["step"] for row in before] == list(range(1, 100))
    # Clips and sigmas, most of a row, are not kept.
    assert before[0] == {"step": 1, "loss": 0.5}
    with open(path, "a") as file:
        file.write('"loss": 1.5}\n\n[]\n{"step": 101}')
    after = reader.read(path)
    assert after[99:] == [{"step": 100, "loss": 1.5}, {"step": 101}] and len(before) == 99
    assert all(old is new for old, new in zip(before, after, strict=False)), "no row is read twice"
    with open(path, "a") as file:
        file.write("\n" + text_of([102]))
    assert [row["step"] for row in reader.read(path)] == list(range(1, 103))


# Longer than the parts that are compared at the start and the end.
OLD = text_of(range(1, 41))
CORRECTED = OLD.replace('"step": 20, "loss": 0.5', '"step": 20, "loss": 0.7')


@pytest.mark.parametrize(
    ("new", "is_replaced"),
    [
        *itertools.product(
            [
                text_of(range(1, 20)),
                text_of(range(1, 61), lr=0.1),
                text_of([*range(1, 20), *range(90, 140)]),
                CORRECTED,
            ],
            [True, False],
        ),
        (CORRECTED + text_of([41]), True),
    ],
)
def test_a_file_that_is_written_anew_is_read_anew(tmp_path, new, is_replaced):
    path, reader = tmp_path / "metrics.jsonl", RowReader()
    path.write_text(OLD)
    assert len(reader.read(path)) == 40
    target = tmp_path / "new" if is_replaced else path
    target.write_text(new)
    # The timestamps of a disk may be too coarse to differ.
    os.utime(target, (2e9, 2e9))
    os.replace(target, path)
    assert reader.read(path) == RowReader().read(path) and len(reader.read(path)) == new.count("\n")
    path.unlink()
    assert reader.read(path) == []


def test_every_file_in_use_is_kept_and_no_line_of_it_is_parsed_again(tmp_path, monkeypatch):
    now, parsed, shown = [0.0], [], rows._shown
    monkeypatch.setattr(rows, "monotonic", lambda: now[0])
    monkeypatch.setattr(rows, "_shown", lambda line: parsed.append(line) or shown(line))
    reader, paths = RowReader(), [tmp_path / f"{number}.jsonl" for number in range(100)]
    for path in paths:
        path.write_text(text_of([1, 2]))
    for _ in range(3):
        for path in paths:
            reader.read(path)
    assert len(parsed) == 200
    # The others have not been used for a long time, and leave the memory.
    now[0] = rows.KEEP_SECONDS
    reader.read(paths[7])
    now[0] += 1
    reader.read(paths[7])
    assert len(parsed) == 200 and list(reader._files) == [str(paths[7])]
    reader.read(paths[8])
    assert len(parsed) == 202


def test_threads_read_while_the_file_grows(tmp_path):
    path, reader = tmp_path / "metrics.jsonl", RowReader()
    path.touch()
    with ThreadPoolExecutor(4) as threads, open(path, "a", buffering=1) as file:
        found = [threads.submit(reader.read, path) for step in range(200) if file.write(text_of([step]))]
        steps = [[row["step"] for row in each.result()] for each in found]
    assert all(each == list(range(len(each))) for each in steps)
    assert [row["step"] for row in reader.read(path)] == list(range(200))
