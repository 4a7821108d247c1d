"""What a scheduler, a service, a shell or a neighbour does to a program: taken names, taken ports, closed streams."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_process import Disturbance, Program
from helpers_road import ENVIRONMENT, LORA, command, prepared, road

from mochi_tune.sampling.video import read_frames

RENDER = ["sample.steps=2", "sample.num_frames=7", "prompt=a red ball"]
BASE = [*RENDER, "adapter=none"]
TWO = ["parallel.num_processes=2", "parallel.context=2"]


@pytest.mark.parametrize("out", [None, "mine.mp4"])
def test_two_renderings_that_choose_one_name_at_once_are_two_videos(tmp_path, out):
    samples = tmp_path / "samples"
    arguments = [*road(tmp_path), *BASE, "save_latents=true", *([f"out={samples / out}"] if out else [])]
    both = [
        Program(
            ["sample", "conf=my_lora", *arguments],
            tmp_path / f"log{i}",
            Disturbance(samples, signal_at=1, signal=signal.SIGSTOP),
        )
        for i in range(2)
    ]
    for one in both:
        # Its names have been chosen; the folder is what it makes first.
        one.wait_until_stopped()
    for one in both:
        one.send(signal.SIGCONT)
    assert [one.wait() for one in both] == [0, 0], [one.text() for one in both]
    videos = sorted(samples.glob("*.mp4"))
    stem = "mine" if out else "a_red_ball_seed_0_001"
    assert [video.name for video in videos] == [f"{stem}.mp4", f"{stem}_2.mp4"]
    assert {one.out.strip() for one in both} == {f"video: {video}" for video in videos}
    assert sorted(path.name for path in samples.iterdir()) == sorted(
        f"{stem}{number}.{suffix}" for number in ("", "_2") for suffix in ("json", "mp4", "safetensors")
    )
    for video in videos:
        assert len(read_frames(video)) == 7
        assert json.loads(video.with_suffix(".json").read_text())["prompt"] == "a red ball"


def test_a_taken_port_29500_is_not_needed(tmp_path):
    with contextlib.ExitStack() as taken:
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            server = taken.enter_context(socket.socket(family))
            # It may be taken already, or there is no IPv6 here.
            with contextlib.suppress(OSError):
                server.bind((address, 29500))
                server.listen()
        done = Program(["sample", "conf=my_lora", *road(tmp_path), *BASE, *TWO], tmp_path / "log")
        assert done.wait() == 0, done.text()
    assert Path(done.out.strip().removeprefix("video: ")).exists()


IPV6_ONLY = """
ip link set lo up && ip -4 address flush dev lo && mount --bind "$1" /etc/hosts || exit 77
shift
exec "$@"
"""


def test_a_host_with_ipv6_alone_will_do(tmp_path):
    (tmp_path / "hosts").write_text(f"::1 localhost\n::1 {socket.gethostname()}\n")
    # A network and a table of names of its own, which takes a privilege.
    done = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", IPV6_ONLY, "sh", str(tmp_path / "hosts"),
         *command("sample", "conf=my_lora", *road(tmp_path), *BASE, *TWO)],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    ) if shutil.which("unshare") and shutil.which("ip") else None  # fmt: skip
    if done is None or (done.returncode in (1, 77) and "mochi-tune" not in done.stderr):
        pytest.skip("no network namespace can be made here")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip().removeprefix("video: ")).exists()


# Closed stdin, no terminal, a home that nothing can be written to, a strict umask and few files.
BARE = 'exec <&-; unset TERM; export HOME=/proc/nowhere XDG_CACHE_HOME= HF_HOME=; umask 077; ulimit -n 64; exec "$@"'


def bare(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sh", "-c", BARE, "sh", *command(*arguments)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def test_every_verb_works_without_stdin_terminal_home_and_with_few_files(tmp_path):
    videos = prepared() / "videos"
    arguments = [
        "conf=my_lora",
        *road(tmp_path / "run", *LORA),
        f"data.videos={videos}",
        f"data.cache={tmp_path / 'cache'}",
    ]
    adapter = tmp_path / "run" / "adapter.safetensors"
    for verb, more in {
        "prepare": [],
        "train": ["train.steps=2", "train.sample_every=2", "train.sample_prompts=[a cat]", "sample.steps=2"],
        "sample": [*RENDER],
    }.items():
        done = bare(verb, *arguments, *more)
        assert done.returncode == 0, (verb, done.stderr)
    assert bare("export", f"adapter={adapter}", "to=diffusers", f"out={tmp_path / 'out.safetensors'}").returncode == 0
    made = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
    assert len(made) > 10 and all(path.stat().st_mode & 0o077 == 0 for path in made)


def test_a_home_that_cannot_be_written_is_one_line(tmp_path):
    done = bare("sample", "conf=my_lora", "model=tiny", *BASE, "device=cpu", f"run_dir={tmp_path}")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("mochi-tune: /proc/nowhere"), done.stderr
    assert "choose another path" in last and not list(tmp_path.rglob("*.mp4"))


def shell(script: str) -> subprocess.CompletedProcess:
    environment = ENVIRONMENT | {"MOCHI": f"{sys.executable} -m mochi_tune.cli"}
    script = f"set -o pipefail; {script}"
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", ["train --help", "train conf=my_lora --cfg", "--help", "export --help"])
def test_a_reader_that_leaves_early_is_no_error(arguments):
    done = shell(f"$MOCHI {arguments} | head -n 1")
    # All of it may fit into the pipe before the reader goes.
    assert done.returncode in (0, 128 + signal.SIGPIPE) and done.stderr == "" and done.stdout.count("\n") == 1
    done = shell(f"$MOCHI {arguments} | true")
    assert done.returncode in (0, 128 + signal.SIGPIPE) and done.stderr == ""


def test_streams_that_are_closed_or_full_are_no_traceback(tmp_path):
    closed = shell(f"$MOCHI export adapter={tmp_path / 'none'} to=official out=x.safetensors <&- >&-")
    assert closed.returncode == 2 and closed.stderr.count("\n") == 1 and "does not exist" in closed.stderr
    unheard = shell("$MOCHI train --help >&-")
    assert unheard.returncode == 0 and unheard.stderr == ""
    silent = shell("$MOCHI train conf=my_lora --cfg <&- 2>&-")
    assert silent.returncode == 0 and "name: my_lora" in silent.stdout
    dark = shell("$MOCHI train conf=nope <&- >&- 2>&-")
    assert dark.returncode == 2
    full = shell("$MOCHI train --help > /dev/full")
    assert full.returncode == 2
    assert full.stderr == "mochi-tune: No space left on device: choose another path.\n"


def test_a_run_whose_reader_has_gone_goes_on(tmp_path):
    arguments = " ".join(f"'{one}'" for one in ["conf=my_lora", *road(tmp_path, *LORA, "train.steps=2")])
    done = shell(f"$MOCHI train {arguments} 2>/dev/null | true")
    assert done.returncode == 0
    assert (tmp_path / "adapter.safetensors").exists() and list(tmp_path.glob("checkpoints/step_000002/*"))
