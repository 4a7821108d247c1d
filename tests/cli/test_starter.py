"""How several processes that were started together have ended."""

import signal

import pytest

from mochi_tune.cli.launch import LOST_CONTACT
from mochi_tune.cli.starter import STOPPED_FILE, report_failures, tell_the_starter
from mochi_tune.errors import ParallelError


def test_the_rank_that_failed_is_named_and_not_those_that_lost_it():
    lost, killed, asked = (LOST_CONTACT, 101), (-signal.SIGKILL, 100), (-signal.SIGTERM, 101)
    with pytest.raises(ParallelError, match=r"rank 2 was ended by SIGKILL, and all others with it; out of memory"):
        report_failures({0: asked, 1: lost, 2: killed, 3: lost})
    with pytest.raises(ParallelError, match=r"rank 2 lost contact"):
        report_failures({1: asked, 2: lost, 3: lost})
    with pytest.raises(ParallelError, match=r"rank 1 was ended by SIGTERM"):
        report_failures({0: asked, 1: (-signal.SIGTERM, 100), 2: lost})
    assert report_failures({0: lost, 1: asked, 3: (2, 100)}) == 2


def test_a_rank_that_had_to_be_killed_after_the_others_is_the_one_that_hung():
    with pytest.raises(ParallelError, match=r"rank 1 did not answer and had to be killed"):
        report_failures({0: (LOST_CONTACT, 100), 1: (-signal.SIGKILL, 110), 2: (-signal.SIGTERM, 100)})


@pytest.mark.parametrize(("code", "own", "reported"), [(0, 0, None), (1, 0, "1"), (2, 2, None), (143, 0, "143")])
def test_a_run_that_is_no_error_ends_with_its_own_code(tmp_path, monkeypatch, code, own, reported):
    monkeypatch.setenv(STOPPED_FILE, str(tmp_path / "stopped"))
    assert tell_the_starter(code) == own
    assert [path.read_text() for path in tmp_path.iterdir()] == ([reported] if reported else [])
