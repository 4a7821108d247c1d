from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from mochi_tune.data_prep.ray_pool import RayPool
from mochi_tune.errors import ParallelError


@dataclass
class PlainJob:
    device: str = "cpu"


def test_a_folder_of_temporary_files_with_a_name_too_long_for_ray_is_one_line(tmp_path, monkeypatch):
    long = tmp_path / ("long" * 30)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with pytest.raises(ParallelError, match=r"whose path is too long for that: set TMPDIR, and") as error:
        RayPool(PlainJob(), 1, None).__enter__()
    assert f"temporary files, {long}, whose" in str(error.value) and "\n" not in str(error.value)


def test_ray_does_not_get_the_working_folder_in_which_its_workers_would_search_for_modules(tmp_path, monkeypatch):
    folders = []

    def refuse(*_, **__):
        folders.append(Path.cwd())
        raise OSError("AF_UNIX path length cannot exceed 107 bytes: /x/ray/session_1/sockets/name")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParallelError, match="set TMPDIR"):
        RayPool(PlainJob(), 1, None).__enter__()
    assert folders == [Path("/")] and Path.cwd() == tmp_path
