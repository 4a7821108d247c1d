"""The command line: verbs, help, and the only place that prints."""

import sys
from collections.abc import Callable
from errno import EACCES, EDQUOT, EEXIST, EISDIR, ENOSPC, ENOTDIR, EPERM, EROFS
from pathlib import Path

from mochi_tune.errors import ConfigError, MochiTuneError

# What a disk or a path says no with; any other OSError is a bug and keeps its traceback.
USERS_TROUBLE = (EACCES, EDQUOT, EEXIST, EISDIR, ENOSPC, ENOTDIR, EPERM, EROFS)

USAGE = """\
mochi-tune: a folder of videos becomes a LoRA for Mochi 1 that renders everywhere.

  mochi-tune prepare conf=NAME [key=value ...]    videos and captions -> cache, once
  mochi-tune train   conf=NAME [key=value ...]    cache -> run folder with adapter.safetensors; the same command resumes
  mochi-tune sample  conf=NAME prompt="..." [adapter=FILE adapter_strength=X seed=N out=FILE save_latents=true]
  mochi-tune export  adapter=FILE to=official|diffusers|comfyui out=FILE
  mochi-tune weights pull [to=DIR]                fetch the official weights, checked by sha256
  mochi-tune verify  reference=DIR [device=cpu] [dtype=fp32|bf16]
  mochi-tune demo    [out=DIR]                    the whole road on the embedded tiny model and a real clip

conf=NAME is conf/NAME.yaml here, else the packaged one, else a path. VERB --help lists its settings, and
`prepare`, `train` and `sample` take --cfg to print the settings that would run, without running.
"""


def main(arguments: list[str] | None = None) -> None:
    """Runs a verb and exits: 0 done, 1 done with refused clips or failed checks, 2 a user's mistake, in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        sys.exit(run(arguments))
    except MochiTuneError as error:
        print(f"mochi-tune: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in USERS_TROUBLE:
            raise
        print(f"mochi-tune: {error.filename}: {error.strerror}: free it, or name another place.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("mochi-tune: interrupted", file=sys.stderr)
        sys.exit(130)


def run(arguments: list[str]) -> int:
    """Dispatches to a verb; returns the exit code."""
    verbs: dict[str, Callable[[list[str]], int]] = {
        "prepare": run_prepare,
        "train": run_train,
        "sample": run_sample,
        "export": run_export,
        "weights": run_weights,
        "verify": run_verify,
        "demo": run_demo,
    }
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("mochi-tune"))
        return 0
    if arguments[0] not in verbs:
        import difflib

        near = difflib.get_close_matches(arguments[0], verbs, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": use one of {', '.join(verbs)}."
        raise ConfigError(f"{arguments[0]} is not a verb{hint}")
    return verbs[arguments[0]](arguments[1:])


def run_prepare(arguments: list[str]) -> int:
    """Makes the cache."""
    if (config := load("prepare", arguments)) is None:
        return 0
    from mochi_tune.data_prep.prepare import main as prepare

    return prepare(config)


def run_train(arguments: list[str]) -> int:
    """Trains or resumes."""
    if (config := load("train", arguments)) is None:
        return 0
    from mochi_tune.recipes.train_lora import main as train

    return train(config)


def run_sample(arguments: list[str]) -> int:
    """Renders a video."""
    if (config := load("sample", arguments)) is None:
        return 0
    from mochi_tune.recipes.sample import main as sample

    print(sample(config))
    return 0


def load(verb: str, arguments: list[str]):
    """Loads the settings of a verb; prints them, or its help, and returns None where that is asked for."""
    from mochi_tune.config import SAMPLE_ALIASES, config_yaml, load_config, packaged_folder

    if "--help" in arguments or "-h" in arguments:
        usage = next(line for line in USAGE.splitlines() if line.startswith(f"  mochi-tune {verb}"))
        print(f"{usage.strip()}\n\nSettings and their defaults; any is given as key.sub=value:\n")
        print((packaged_folder() / "base.yaml").read_text(), end="")
        return None
    flags = [argument for argument in arguments if argument.startswith("-")]
    if unknown := [flag for flag in flags if flag != "--cfg"]:
        raise ConfigError(f"{unknown[0]} is not an option: use --help or --cfg; settings are written key=value.")
    settings = [argument for argument in arguments if argument not in flags]
    names = [setting.removeprefix("conf=") for setting in settings if setting.startswith("conf=")]
    if len(names) != 1:
        raise ConfigError(f"{verb} takes one conf=NAME, got {len(names)}: for example conf=my_lora.")
    settings = [setting for setting in settings if not setting.startswith("conf=")]
    if verb == "sample":
        settings = [f"sample.{s}" if s.partition("=")[0] in SAMPLE_ALIASES else s for s in settings]
    config = load_config(names[0], settings)
    if flags:
        print(config_yaml(config), end="")
        return None
    return config


def run_export(arguments: list[str]) -> int:
    """Converts an adapter file."""
    options = plain_options("export", arguments, required=("adapter", "to", "out"))
    if options is None:
        return 0
    from mochi_tune.recipes.export import main as export

    print(export(Path(options["adapter"]), options["to"], Path(options["out"])))
    return 0


def run_weights(arguments: list[str]) -> int:
    """Fetches the official weights."""
    if arguments[:1] != ["pull"]:
        raise ConfigError(f"weights {' '.join(arguments[:1])} is not a verb: use `mochi-tune weights pull`.")
    defaults = {
        "to": "~/.cache/mochi_tune/mochi-1-preview",
        "repo": "genmo/mochi-1-preview",
        "revision": "main",
        "endpoint": "",
    }
    options = plain_options("weights pull", arguments[1:], defaults=defaults)
    if options is None:
        return 0
    from mochi_tune.recipes.pull_weights import main as pull

    folder = Path(options["to"]).expanduser()
    pull(folder, options["repo"], options["revision"], options["endpoint"] or None)
    print(folder)
    return 0


def run_verify(arguments: list[str]) -> int:
    """Compares this machine's numbers with the official ones."""
    options = plain_options("verify", arguments, required=("reference",), defaults={"device": "cpu", "dtype": "fp32"})
    if options is None:
        return 0
    for key, allowed in (("device", ("cpu", "cuda", "auto")), ("dtype", ("fp32", "bf16"))):
        if options[key] not in allowed:
            raise ConfigError(f"{key}={options[key]} is not possible: use {' or '.join(allowed)}.")
    from mochi_tune.recipes.verify import main as verify

    checks = verify(Path(options["reference"]), options["device"], options["dtype"])
    print(f"{'check':<58} {'max relative error':>18} {'tolerance':>9}")
    failed = 0
    for check in checks:
        print(
            f"{check.name:<58} {check.error:>18.2e} {check.tolerance:>9.0e}  {'ok' if check.ok else 'FAIL'}", flush=True
        )
        failed += not check.ok
    print(f"{failed} checks FAILED" if failed else "every check is ok")
    return 1 if failed else 0


def run_demo(arguments: list[str]) -> int:
    """Walks the whole road on the embedded tiny model."""
    options = plain_options("demo", arguments, defaults={"out": "demo_out"})
    if options is None:
        return 0
    from mochi_tune.recipes.demo import main as demo

    for label, path in demo(Path(options["out"])).items():
        print(f"{label + ':':<16} {path}")
    return 0


def plain_options(
    verb: str, arguments: list[str], required: tuple[str, ...] = (), defaults: dict[str, str] | None = None
) -> dict[str, str] | None:
    """Reads the key=value arguments of a verb that has no configuration file; None where help was asked for."""
    options = dict(defaults or {})
    allowed = [*required, *options]
    if "--help" in arguments or "-h" in arguments:
        shown = [f"{key}=..." for key in required] + [f"[{key}={value}]" for key, value in options.items()]
        print(f"mochi-tune {verb} {' '.join(shown)}")
        return None
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in allowed:
            raise ConfigError(
                f"{argument!r} is not a setting of {verb}, which are {', '.join(f'{k}=' for k in allowed)}."
            )
        options[key] = value
    if missing := [key for key in required if not options.get(key)]:
        raise ConfigError(f"{verb} needs {', '.join(f'{key}=...' for key in missing)}: see `mochi-tune {verb} --help`.")
    return options


if __name__ == "__main__":
    main()
