"""Whether the processes of a run were started alike."""

from collections.abc import Mapping

from accelerate import PartialState
from accelerate.utils import gather_object

from mochi_tune.errors import ParallelError


def check_agreement(facts: Mapping[str, object]) -> None:
    """Refuses processes that were started with other files or settings; all processes call it together.

    Args:
        facts: what must be the same everywhere, by its name in an error.

    Raises:
        ParallelError: on the main process, naming the first difference and its ranks.
        SystemExit: on the others, with 2.
    """
    everyones = gather_object([dict(facts)])
    absent = "nothing"
    for name in dict.fromkeys(name for each in everyones for name in each):
        first, *others = (each.get(name, absent) for each in everyones)
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
