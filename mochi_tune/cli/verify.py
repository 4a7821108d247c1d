"""The verb `verify`: compares this machine's numbers with the official ones."""

from pathlib import Path

from mochi_tune.cli.options import VERIFY_OPTIONS, plain_options
from mochi_tune.cli.starter import run_in_processes
from mochi_tune.cli.values import whole_number
from mochi_tune.errors import ConfigError


def run_verify(arguments: list[str]) -> int:
    """Compares this machine's numbers with the official ones."""
    options = plain_options("verify", arguments, VERIFY_OPTIONS)
    if options is None:
        return 0
    for key, allowed in (("device", ("cpu", "cuda", "auto")), ("dtype", ("fp32", "bf16"))):
        if options[key] not in allowed:
            raise ConfigError(f"{key}={options[key]} is not possible: use {' or '.join(allowed)}.")
    if whole_number("parallel.num_processes", options["parallel.num_processes"], 1) > 1:
        from mochi_tune.recipes.verify import check_reference

        check_reference(Path(options["reference"]) if options["reference"] else None)
    return run_in_processes("verify", arguments, options, lambda is_first: verify_here(options, is_first))


def verify_here(options: dict[str, str], is_first: bool) -> int:
    """Runs the checks of one process; the first process prints them."""
    from mochi_tune.recipes.verify import main as verify

    reference = Path(options["reference"]) if options["reference"] else None
    checks = verify(reference, options["device"], options["dtype"])
    if is_first:
        print(f"{'check':<66} {'max relative error':>18} {'tolerance':>9}")
    failed = 0
    for check in checks:
        failed += not check.ok
        if is_first:
            verdict = "ok" if check.ok else "FAIL"
            print(f"{check.name:<66} {check.error:>18.2e} {check.tolerance:>9.0e}  {verdict}", flush=True)
    if is_first:
        print(f"{failed} checks FAILED" if failed else "every check is ok")
    return 1 if failed and is_first else 0
