"""The verb `weights`: downloads the weights, and reports which are there."""

import shlex
import sys

from mochi_tune.cli.options import PULL_OPTIONS, plain_options
from mochi_tune.cli.values import hub_address, true_or_false, user_path
from mochi_tune.errors import ConfigError


def run_weights(arguments: list[str]) -> int:
    """Downloads weights, or reports which are there; returns 1 if a verb lacks some."""
    subverb, arguments = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if subverb in ("--help", "-h"):
        print("mochi-tune weights pull | check: see `mochi-tune weights pull --help`")
        return 0
    if subverb == "check":
        return run_check(arguments)
    if subverb != "pull":
        raise ConfigError(f"weights {subverb} is not a verb: use `mochi-tune weights pull` or `weights check`.")
    options = plain_options("weights pull", arguments, PULL_OPTIONS)
    if options is None:
        return 0
    from mochi_tune.weights.pull import PullSettings, plan_pull
    from mochi_tune.weights.pull import main as pull

    folder = user_path(options["to"])
    precision, repo, revision = (options[name] or None for name in ("precision", "repo", "revision"))
    settings = PullSettings(options["source"], precision, repo, revision, hub_address(options["endpoint"]))
    if true_or_false("dry_run", options["dry_run"]):
        print(*plan_pull(folder, settings).describe(), sep="\n")
        return 0
    for note in pull(folder, settings):
        print(f"mochi-tune: {note}", file=sys.stderr)
    print(folder)
    return 0


def run_check(arguments: list[str]) -> int:
    """Prints which weights of a configuration, or of `model.…` settings alone, are there."""
    if "--help" in arguments or "-h" in arguments:
        print("mochi-tune weights check [conf=NAME] [model.weights=DIR|FILE] [model.transformer=FILE ...]")
        return 0
    from mochi_tune.config.load import load_config, weights_paths
    from mochi_tune.weights.check import check_weights
    from mochi_tune.weights.folder import WeightsFolder

    for argument in arguments:
        if "=" not in argument and not argument.startswith("-"):
            meant = shlex.quote(f"model.weights={argument}")
            raise ConfigError(f"{argument!r} is not a setting of weights check; did you mean {meant}?")
    names = [argument.removeprefix("conf=") for argument in arguments if argument.startswith("conf=")]
    settings = [argument for argument in arguments if not argument.startswith("conf=")]
    report = check_weights(WeightsFolder(weights_paths(load_config(names[-1] if names else "base", settings))))
    print(*report.parts, "", *report.verbs, sep="\n")
    return 0 if report.is_complete else 1
