import os
from pathlib import Path

import pytest
from helpers_jobs import count, fail

from mochi_tune.data_prep.watched import WatchedProcess
from mochi_tune.errors import DataError

PATH = Path("a\udcff.mp4")


@pytest.fixture(scope="module")
def child():
    with WatchedProcess(1.0) as child:
        yield child


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("data", "is damaged"),
        ("bug", "cannot be used (KeyError: 'unexpected')"),
        ("die", "the decoder died on it, killed by SIGSEGV"),
        ("hang", "nothing was decoded of it for 1 s"),
    ],
)
def test_what_goes_wrong_is_the_files(child, how, text):
    with pytest.raises(DataError) as error:
        list(child.run(fail, PATH, {"how": how}))
    assert text in str(error.value) and str(error.value).startswith(f"{PATH}: ")
    assert [message["number"] for message in child.run(count, PATH, {"number": 3})] == [0, 1, 2]


def test_the_disks_trouble_is_the_callers(child):
    with pytest.raises(OSError) as error:
        list(child.run(fail, PATH, {"how": "disk"}))
    assert (error.value.errno, error.value.filename) == (28, str(PATH))


def test_a_job_that_is_left_ends_with_its_process(child):
    for message in child.run(count, PATH, {"number": 10**9}):
        assert message == {"path": str(PATH), "number": 0}
        pid = child._process.pid
        break
    child.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
