import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_watched import count, fail

from mochi_tune.data_prep.watched import WatchedProcess
from mochi_tune.errors import DataError, printable

PATH = Path("a\udcff.mp4")


@pytest.fixture(scope="module")
def child():
    with WatchedProcess(1.0) as child:
        yield child


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("data", "is damaged"),
        ("bug", "cannot be decoded (KeyError: 'unexpected')"),
        ("die", "the decoder process died (killed by SIGSEGV)"),
        ("hang", "the decoder did not answer within 1 s"),
    ],
)
def test_what_goes_wrong_is_the_files(child, how, text):
    with pytest.raises(DataError) as error:
        list(child.run(fail, PATH, {"how": how}))
    assert text in str(error.value) and str(error.value).startswith(f"{printable(str(PATH))}: ")
    assert [message["number"] for message in child.run(count, PATH, {"number": 3})] == [0, 1, 2]


def test_the_disks_trouble_is_the_callers(child):
    with pytest.raises(OSError) as error:
        list(child.run(fail, PATH, {"how": "disk"}))
    assert (error.value.errno, error.value.filename) == (28, str(PATH))


def test_a_job_that_is_left_ends_with_its_process(child):
    for message in child.run(count, PATH, {"number": 10**9}):
        assert message == {"path": str(PATH), "number": 0}
        pid = child._child.process.pid
        break
    child.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


INTERRUPTED = """
import os, signal, threading, time
from multiprocessing import forkserver
from pathlib import Path
from helpers_watched import count
from mochi_tune.data_prep.watched import WatchedProcess

def interrupt():
    server = forkserver._forkserver
    while server._forkserver_pid is None:
        time.sleep(0.001)
    os.kill(server._forkserver_pid, signal.SIGINT)

if __name__ == "__main__":
    thread = threading.Thread(target=interrupt)
    thread.start()
    with WatchedProcess(60.0) as child:
        print([message["number"] for message in child.run(count, Path("a.mp4"), {"number": 3})])
    thread.join()
"""


def test_a_ctrl_c_while_the_server_of_children_imports_is_not_its_own(tmp_path):
    """A terminal sends it to all processes; only the main one may report it."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "interrupted.py"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1, 2]\n", "")
