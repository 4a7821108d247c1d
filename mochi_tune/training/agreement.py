"""Checks that the processes of a run were started with the same files and settings."""

from collections.abc import Mapping

from accelerate import PartialState
from accelerate.utils import gather_object

from mochi_tune.errors import ParallelError


def check_agreement(facts: Mapping[str, object]) -> None:
    """Checks that facts are the same on all processes, which call this together.

    Args:
        facts: values that must be equal, by their names in the error.

    Raises:
        ParallelError: on the main process, if they differ; it names the first difference and its ranks.
        SystemExit: on the other processes, with code 2.
    """
    gathered = gather_object([dict(facts)])
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


def _shortened(value: object) -> str:
    return str(value) if len(str(value)) <= 32 else f"{str(value)[:16]}…"
