"""The verb `bench`: measures speed and memory."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mochi_tune.cli.options import BENCH_OPTIONS, plain_options
from mochi_tune.cli.starter import run_in_processes
from mochi_tune.cli.values import whole_number
from mochi_tune.errors import ConfigError

if TYPE_CHECKING:
    from mochi_tune.recipes.bench import Bench


def run_bench(arguments: list[str]) -> int:
    """Measures speed and memory."""
    options = plain_options("bench", arguments, BENCH_OPTIONS)
    if options is None:
        return 0
    from mochi_tune.config.docs import packaged_files
    from mochi_tune.config.load import load_config
    from mochi_tune.recipes.bench import Bench, check

    if options["compile"] not in ("true", "false", "auto"):
        raise ConfigError(f"compile={options['compile']} is not possible: use true, false or auto.")
    out = Path(options["out"]) if options["out"] else None
    if out is not None and out.suffix != ".jsonl":
        raise ConfigError(f"out={out} does not fit: results are lines of JSON, so name a .jsonl file.")
    presets, own = packaged_files()["memory"], Path("conf/memory") / f"{options['memory']}.yaml"
    if options["memory"] not in presets and not own.is_file():
        usable = " or ".join(name for name in presets if name != "auto")
        raise ConfigError(f"memory={options['memory']} is not possible: use {usable}.")
    memory = load_config("base", [f"memory={options['memory']}"]).memory
    bench = Bench(
        what=options["what"],
        model=options["model"],
        device=options["device"],
        dtype=options["dtype"],
        num_frames=whole_number("num_frames", options["num_frames"], 1),
        height=whole_number("height", options["height"], 1),
        width=whole_number("width", options["width"], 1),
        repeats=whole_number("repeats", options["repeats"], 1),
        limit_gib=whole_number("limit_gib", options["limit_gib"], 0),
        dit=memory.dit,
        activations=memory.activations,
        depth=None if options["depth"] == "all" else whole_number("depth", options["depth"], 1),
        lora_rank=whole_number("lora_rank", options["lora_rank"], 0),
        compile={"true": True, "false": False}.get(options["compile"]),
        recompute=options["recompute"],
        precision=options["precision"],
    )
    check(bench, whole_number("parallel.num_processes", options["parallel.num_processes"], 1))
    if out is not None:
        from mochi_tune.files import make_writable_folder

        make_writable_folder(out.parent)
    return run_in_processes("bench", arguments, options, lambda is_first: bench_here(bench, out, is_first))


def bench_here(bench: "Bench", out: Path | None, is_first: bool) -> int:
    """Measures in one process; the first process prints the result."""
    from mochi_tune.recipes.bench import main as measure

    figures = measure(bench)
    if is_first:
        text = json.dumps(figures, indent=1)
        if figures["is_reduced"]:
            print(f"reduced: depth {figures['depth']} of {figures['full_depth']}", file=sys.stderr)
        print(text)
        if out is not None:
            with open(out, "a") as file:
                file.write(json.dumps(figures) + "\n")
    return 0
