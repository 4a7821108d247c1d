"""A new output starts without what a killed process left of it."""

import os
import subprocess
import sys

from mochi_tune.files import make_writable_folder, temporary_file, temporary_name
from mochi_tune.recipes.new_output import check_new


def test_what_a_killed_process_left_of_an_output_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    out = tmp_path / "a[1].safetensors"
    left = [tmp_path / temporary_name(out.name, process) for process in (ended.pid, os.getpid())]
    left[0].mkdir()
    (left[0] / "dit.safetensors").touch()
    left[1].touch()
    kept = [
        tmp_path / temporary_name(out.name, os.getppid()),  # Of a process that runs.
        tmp_path / temporary_name("b.safetensors", ended.pid),
        tmp_path / f".{out.name}.000000-{ended.pid}.tmp",  # Of another machine.
        tmp_path / temporary_name(out.name, "xyz"),  # Of another program.
    ]
    for path in kept:
        path.touch()
    check_new(out)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    (tmp_path / temporary_name("c", os.getpid())).touch()  # Of another thread.
    make_writable_folder(tmp_path)
    kept[1] = tmp_path / temporary_name("c", os.getpid())
    assert sorted(tmp_path.iterdir()) == sorted(kept), "what other killed processes left is removed too"
    kept[1].unlink()
    with temporary_file(out) as temporary:
        assert temporary == left[1]
