"""Checks that the processes of a run were started with the same files and settings."""

import hashlib
import importlib.util
import socket
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from mochi_tune.errors import ParallelError
from mochi_tune.files import file_sha256
from mochi_tune.training.accelerator import broadcast


def check_agreement(facts: Mapping[str, object]) -> None:
    """Checks that facts and the code are the same on all processes, which call this together.

    Args:
        facts: values that must be equal, by their names in the error.

    Raises:
        ParallelError: on the main process, if they differ; it names the first difference and its ranks.
        SystemExit: on the other processes, with code 2.
    """
    code = versions("mochi-tune", "torch", "accelerate") | {"the code of mochi-tune": code_digest()}
    gathered = gather_object([code | dict(facts)])
    absent = "nothing"
    for name in dict.fromkeys(name for each in gathered for name in each):
        first, *others = (each.get(name, absent) for each in gathered)
        differing = {rank: value for rank, value in enumerate(others, 1) if value != first}
        if not differing:
            continue
        if not PartialState().is_main_process:
            raise SystemExit(2)  # The main process reports it.
        ranks = f"rank{'s' if len(differing) > 1 else ''} {', '.join(map(str, differing))}"
        raise ParallelError(
            f"{name}: {_shortened(next(iter(differing.values())))} on {ranks}, {_shortened(first)} on rank 0: start "
            "all processes with the same settings, and give each machine the same files."
        )


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of installed packages as facts for `check_agreement`."""
    return {f"the version of {package}": version(package) for package in packages}


def code_digest() -> str:
    """Returns a hash of the Python files of this package, wherever it is installed."""
    found = map(importlib.util.find_spec, ("mochi_tune", "mochi_tune.recipes", "mochi_tune.data_prep"))
    folders = [folder for spec in found if spec is not None for folder in spec.submodule_search_locations or ()]
    # A set, because a wheel has the recipes inside the package.
    files = {file_sha256(path) for folder in folders for path in Path(folder).rglob("*.py")}
    return hashlib.sha256("".join(sorted(files)).encode()).hexdigest()


def check_shared(paths: Sequence[Path], wait_seconds: float) -> None:
    """Checks that all processes see the files of the main process; all call this together.

    Args:
        paths: files; only those of the main process count.
        wait_seconds: seconds to wait for files that a network disk shows late.

    Raises:
        ParallelError: on the main process, if a file is missing or differs on another one.
        SystemExit: on the other processes, with code 2.
    """
    expected = broadcast({path: _digest(path) for path in paths})
    deadline = time.monotonic() + wait_seconds
    while any(_digest(path) != digest for path, digest in expected.items()) and time.monotonic() < deadline:
        time.sleep(0.2)
    wrong = [path for path, digest in expected.items() if _digest(path) != digest]
    (main_host, _), *others = gather_object([(socket.gethostname(), wrong)])
    for rank, (host, unseen) in enumerate(others, 1):
        if not unseen:
            continue
        if not PartialState().is_main_process:
            raise SystemExit(2)  # The main process reports it.
        raise ParallelError(
            f"{unseen[0]} of rank 0 (machine {main_host}) is missing or another file on rank {rank} (machine {host}): "
            f"put {unseen[0].parent} on a disk that all machines share, and name it by its full path."
        )


def _digest(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None


def _shortened(value: object) -> str:
    return str(value) if len(str(value)) <= 32 else f"{str(value)[:16]}…"
