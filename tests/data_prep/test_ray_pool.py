from dataclasses import dataclass

import pytest

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
