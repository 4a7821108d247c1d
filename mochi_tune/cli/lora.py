"""The verb `lora`: tools that inspect, combine and convert adapter files, and bake them into base weights."""

import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mochi_tune.cli.options import LORA_OPTIONS, is_setting, plain_options
from mochi_tune.cli.values import number, true_or_false, user_path, whole_number
from mochi_tune.errors import ConfigError, printable

if TYPE_CHECKING:
    from mochi_tune.adapters.low_rank import Limit

# Number of files, without a key, of each verb: the minimum, and whether more are allowed.
FILES = {"inspect": (1, False), "merge": (2, True), "resize": (1, False), "compare": (2, False), "bake": (1, False)}
# Maximum length of a metadata value in the terminal, which also cuts hashes to 12 digits; `json=true` prints all.
MAX_VALUE = 160


def run_lora(arguments: list[str]) -> int:
    """Runs a tool."""
    verbs = {
        "inspect": run_inspect,
        "merge": run_merge,
        "resize": run_resize,
        "compare": run_compare,
        "bake": run_bake,
        "extract": run_extract,
    }
    verb = arguments[0] if arguments else "--help"
    if verb in ("--help", "-h"):
        for name, known in LORA_OPTIONS.items():
            plain_options(f"lora {name}", ["--help"], known, _files_of(name))
        return 0
    if verb not in verbs:
        near = difflib.get_close_matches(verb, verbs, n=1)
        hint = f"; did you mean lora {near[0]}?" if near else f": use one of {', '.join(verbs)}."
        raise ConfigError(f"lora {verb} is not a verb{hint}")
    parsed = parse(verb, arguments[1:])
    return 0 if parsed is None else verbs[verb](*parsed)


def parse(verb: str, arguments: list[str]) -> tuple[list[str], dict[str, str]] | None:
    """Parses the files and the key=value arguments of a tool; returns None after printing its help.

    Raises:
        ConfigError: an unknown key, a wrong number of files, or a required value is missing.
    """
    files = [os.path.expanduser(each) for each in arguments if not is_setting(each)]
    settings = [each for each in arguments if is_setting(each)]
    options = plain_options(f"lora {verb}", settings, LORA_OPTIONS[verb], _files_of(verb))
    if options is None:
        return None
    least, are_more_possible = FILES.get(verb, (0, False))
    if len(files) < least or (len(files) > least and not are_more_possible):
        number_of = {0: "no adapter file", 1: "an adapter file", 2: "two adapter files"}[least]
        takes = f"{number_of}{' or more' if are_more_possible else ''}"
        usage = f"mochi-tune lora {verb} {_files_of(verb)}".rstrip()
        if not files:
            raise ConfigError(f"lora {verb} needs {takes}: {usage}")
        raise ConfigError(f"lora {verb} takes {takes}, got {', '.join(files)}: {usage}")
    return files, options


def run_inspect(files: list[str], options: dict[str, str]) -> int:
    """Prints what an adapter file holds; with out= also writes a page."""
    is_json = true_or_false("json", options["json"])
    from mochi_tune.adapters.tools import kind_norms
    from mochi_tune.recipes.lora_tools import inspect

    found = inspect(files[0], user_path(options["out"]) if options["out"] else None)
    if is_json:
        print(json.dumps(found.as_json(), indent=1))
        return 0
    layers, adapter = found.layers, found.adapter
    print(f"file     {printable(files[0])}")
    print(f"sha256   {_short(found.sha256)}")
    print(f"layers   {len(layers)}{', a DoRA: norms are before its magnitudes' * adapter.is_dora}")
    print(f"rank     {_listed({each.rank for each in layers.values()})}")
    print(f"alpha    {_listed({each.alpha for each in layers.values()})} ({found.alpha_words})")
    print(f"norm     {math.hypot(*(each.norm for each in layers.values())):.4g}")
    print("metadata")
    for key, value in sorted(adapter.metadata.items()):
        text = _short(printable(" ".join(value.split())))
        print(f"  {printable(key):<18} {text if len(text) <= MAX_VALUE else text[:MAX_VALUE] + ' …'}")
    print("\nnorm of ΔW, and the ranks that hold 90 % and 99 % of its energy")
    cells = {name: f"{each.norm:.3g} {each.rank_90}/{each.rank_99}" for name, each in layers.items()}
    _print_table(cells, {kind: f"{norm:.3g}" for kind, norm in kind_norms(layers).items()})
    if options["out"]:
        print(f"\n{printable(options['out'])}")
    return 0


def run_merge(files: list[str], options: dict[str, str]) -> int:
    """Merges adapters into one."""
    texts = options["strengths"].strip("[]").split(",") if options["strengths"] else ["1"] * len(files)
    strengths = [number("strengths", text) for text in texts]
    limit = _limit(options) if options["rank"] or options["energy"] else None
    from mochi_tune.recipes.lora_tools import merge

    print(printable(str(merge(files, strengths, user_path(options["out"]), limit))))
    return 0


def run_resize(files: list[str], options: dict[str, str]) -> int:
    """Lowers the rank of an adapter."""
    limit = _limit(options)
    from mochi_tune.recipes.lora_tools import resize

    made = resize(files[0], user_path(options["out"]), limit)
    print("rank and relative error of each layer")
    ranks, errors = {name: layer.rank for name, layer in made.adapter.layers.items()}, made.errors
    assert errors is not None, "a reduction measures its error"
    _print_table({name: f"{ranks[name]} {error:.2g}" for name, error in errors.layers.items()})
    print(f"\n{printable(str(made))}")
    return 0


def run_compare(files: list[str], options: dict[str, str]) -> int:
    """Compares two adapters."""
    is_json = true_or_false("json", options["json"])
    from mochi_tune.recipes.lora_tools import compare

    found = compare(*files)
    if is_json:
        print(json.dumps({**vars(found), "is_same": found.is_same}, indent=1))
        return 0
    for file, only in zip(files, (found.only_first, found.only_second), strict=True):
        if only:
            print(printable(f"only in {file}: {len(only)} layers, {', '.join(only)}"))
    if found.differences:
        print("relative difference and cosine of ΔW, by layer")
        _print_table({name: f"{gap:.2g} {found.cosines[name]:.4f}" for name, gap in found.differences.items()})
        print()
    print(f"in all: relative difference {found.difference:.2g}, cosine {found.cosine:.6f}{found.note}")
    print("the same change of the weights" if found.is_same else "not the same change of the weights")
    return 0


def run_bake(files: list[str], options: dict[str, str]) -> int:
    """Bakes an adapter into base weights."""
    if not (strength := number("strength", options["strength"])):
        raise ConfigError("strength=0 is the base itself: use another number.")
    base = _weights("model.weights", options["model.weights"])
    from mochi_tune.recipes.lora_bake import Settings
    from mochi_tune.recipes.lora_bake import main as bake

    settings = Settings(strength, options["to"], options["dtype"])
    print(printable(str(bake(files[0], base, user_path(options["out"]), settings))))
    return 0


def run_extract(_: list[str], options: dict[str, str]) -> int:
    """Extracts an adapter from the difference of two checkpoints."""
    rank = whole_number("rank", options["rank"], 1)
    base, tuned = (_weights(key, options[key]) for key in ("base", "tuned"))
    from mochi_tune.recipes.lora_extract import main as extract

    made = extract(base, tuned, user_path(options["out"]), rank, options["targets"])
    assert made.errors is not None, "an approximation measures its error"
    print("relative error of each layer")
    _print_table({name: f"{error:.2g}" for name, error in made.errors.layers.items()})
    if made.not_held:
        print("\nlayers that differ and that the adapter does not hold, with the relative difference")
        for name, difference in made.not_held.items():
            print(f"  {name:<40} {difference:.2g}")
    print(f"\n{printable(str(made))}")
    return 0


def _print_table(cells: Mapping[str, str], totals: Mapping[str, str] | None = None) -> None:
    """Prints a table with a row per block, a column per kind of layer, and a row of totals."""
    from mochi_tune.adapters.tools import block_and_kind

    places = {block_and_kind(name): text for name, text in cells.items()}
    kinds = sorted({kind for block, kind in places if block is not None})
    widths = [max(len(kind), *(len(text) for (_, k), text in places.items() if k == kind)) for kind in kinds]
    if kinds:
        print(f"block  {'  '.join(f'{kind:>{width}}' for kind, width in zip(kinds, widths, strict=True))}")
    for block in sorted({block for block, _ in places if block is not None}):
        row = (f"{places.get((block, kind), '-'):>{width}}" for kind, width in zip(kinds, widths, strict=True))
        print(f"{block:>5}  {'  '.join(row)}")
    if totals and kinds:
        row = (f"{totals[kind]:>{width}}" for kind, width in zip(kinds, widths, strict=True))
        print(f"{'all':>5}  {'  '.join(row)}")
    for (block, name), text in places.items():
        if block is None:
            print(f"{name}  {text}")


def _files_of(verb: str) -> str:
    """Returns the files of a tool, for its help: "FILE", "FILE FILE" or "FILE FILE ..."."""
    least, are_more_possible = FILES.get(verb, (0, False))
    return " ".join(["FILE"] * least + ["..."] * are_more_possible)


def _short(text: str) -> str:
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", text)


def _listed(values: set) -> str:
    texts = [f"{value:g}" for value in sorted(values)]
    return ", ".join(texts) if len(texts) <= 8 else f"{texts[0]} to {texts[-1]}"


def _limit(options: dict[str, str]) -> "Limit":
    from mochi_tune.adapters.low_rank import Limit

    rank, energy = options["rank"], options["energy"]
    return Limit(whole_number("rank", rank, 1) if rank else None, number("energy", energy) if energy else None)


def _weights(key: str, text: str) -> Path:
    """Returns a weights folder or file, named as by the setting model.weights."""
    from mochi_tune.config.load import load_config, weights_folder

    folder = weights_folder(load_config("base", [f"model.weights={text}"]))
    if not folder.exists():
        raise ConfigError(f"{key}={text} does not exist: name weights, such as the folder of `weights pull`.")
    return folder
