"""The verb `doctor`: checks this machine and says how to fix what is missing."""

from mochi_tune.cli.options import DOCTOR_OPTIONS, plain_options
from mochi_tune.cli.values import user_path
from mochi_tune.errors import ConfigError


def run_doctor(arguments: list[str]) -> int:
    """Prints a line per check; returns 1 if a run would fail."""
    options = plain_options("doctor", arguments, DOCTOR_OPTIONS)
    if options is None:
        return 0
    if options["device"] not in ("cpu", "cuda", "auto"):
        raise ConfigError(f"device={options['device']} is not possible: use cpu, cuda or auto.")
    from mochi_tune.recipes.doctor import FAIL, NOTE, main

    failed = noted = 0
    for finding in main(user_path(options["model.weights"]), options["device"]):
        failed, noted = failed + (finding.verdict == FAIL), noted + (finding.verdict == NOTE)
        print(f"{finding.verdict:<5} {finding.name:<10} {finding.says}", flush=True)
        if finding.advice:
            print(f"{'':<16} {finding.advice}", flush=True)
    notes = f"; {noted} notes on what only some runs need" if noted else ""
    print(f"{failed} FAILED: see the advice below each" if failed else f"nothing failed{notes}")
    return 1 if failed else 0
