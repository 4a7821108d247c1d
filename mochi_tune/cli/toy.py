"""The verbs of the toy world: demo, experiment and toy."""

import sys
from pathlib import Path

from mochi_tune.cli.launch import INTERRUPTED
from mochi_tune.cli.options import (
    DEMO_OPTIONS,
    EXPERIMENT_OPTIONS,
    EXPERIMENTS,
    TOY_OPTIONS,
    plain_options,
)
from mochi_tune.cli.values import whole_number
from mochi_tune.errors import ConfigError


def run_demo(arguments: list[str]) -> int:
    """Teaches the embedded toy model a new motion."""
    options = plain_options("demo", arguments, DEMO_OPTIONS)
    if options is None:
        return 0
    from mochi_tune.toy.demo import main as demo

    made = demo(Path(options["out"]))
    before, after, kept = (f"{float(made[name]):.0%}" for name in ("new_before", "new_after", "base_after"))
    print(
        f"The toy model learnt a new motion: {before} of the samples moved that way before training, {after} after "
        f"it, and {kept} of the old captions are still right.\nOpen {made['report']} in a browser."
    )
    return 0


def run_experiment(arguments: list[str]) -> int:
    """Compares training settings."""
    options = plain_options("experiment", arguments, EXPERIMENT_OPTIONS)
    if options is None:
        return 0
    if options["what"] not in EXPERIMENTS:
        raise ConfigError(f"what={options['what']} is not an experiment: use one of {', '.join(EXPERIMENTS)}.")
    seeds, out = whole_number("seeds", options["seeds"], 1), Path(options["out"])
    if options["what"] == "guidance":
        from mochi_tune.toy.guidance import main as compare_guidance

        print(compare_guidance(seeds, out))
        return 0
    from mochi_tune.toy.experiment import main as experiment

    print(experiment(options["what"], seeds, out))
    return 0


def run_toy(arguments: list[str]) -> int:
    """Draws the clips of the demo, or trains the toy model."""
    if arguments[:1] not in (["clips"], ["weights"]):
        if arguments[:1] in ([], ["--help"], ["-h"]):
            for name, known in TOY_OPTIONS.items():
                plain_options(f"toy {name}", ["--help"], known)
            return 0
        raise ConfigError(f"toy {arguments[0]} is not a verb: use `toy clips` or `toy weights`.")
    options = plain_options(f"toy {arguments[0]}", arguments[1:], TOY_OPTIONS[arguments[0]])
    if options is None:
        return 0
    if arguments[0] == "clips":
        from mochi_tune.toy.lesson import write_lesson

        videos = write_lesson(Path(options["out"]), whole_number("seed", options["seed"], 0))
        print(f"{len(videos)} clips: {options['out']}")
        return 0
    from mochi_tune.toy.train_toy import Plan
    from mochi_tune.toy.train_toy import main as train_toy

    record = train_toy(Path(options["work"]), Path(options["out"]), Plan())
    if record is None:
        print("interrupted and saved; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    for name, value in record["figures"].items():
        print(f"{name + ':':<16} {value}")
    return 0
