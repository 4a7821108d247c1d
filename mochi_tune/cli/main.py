"""The command line: dispatches to the verbs, and reports errors with the exit code of each."""

import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from mochi_tune.cli.bench import run_bench
from mochi_tune.cli.completion import run_completion
from mochi_tune.cli.connect import joined
from mochi_tune.cli.describe import run_describe
from mochi_tune.cli.doctor import run_doctor
from mochi_tune.cli.footage import run_filter, run_split
from mochi_tune.cli.init import run_init
from mochi_tune.cli.launch import (
    INTERRUPTED,
    STARTED_HERE,
    USERS_MISTAKE,
    check_gpus,
    check_num_processes,
    check_python,
    drop_rank_variables,
    end_with_the_starter,
    import_nothing_from_here,
    keep_compiled_code,
    let_segments_grow,
    name_process,
    num_processes_here,
    prepare_deepspeed,
    prepare_ray,
    spare_the_collector,
    uses_gpus,
)
from mochi_tune.cli.lora import run_lora
from mochi_tune.cli.options import (
    LORA_OPTIONS,
    REPLAY_OPTIONS,
    USAGE,
    is_setting,
    load,
    plain_options,
)
from mochi_tune.cli.plan import run_plan
from mochi_tune.cli.publish import check_push, push_trained, run_export
from mochi_tune.cli.starter import start_processes, tell_the_starter
from mochi_tune.cli.stdio import PatientStream, drop_output, is_reader_gone, open_missing_streams, slow_bars
from mochi_tune.cli.toy import run_demo, run_experiment, run_toy
from mochi_tune.cli.ui import run_ui
from mochi_tune.cli.verify import run_verify
from mochi_tune.cli.weights import run_weights
from mochi_tune.errors import ConfigError, MochiTuneError, ParallelError, printable

# Errors of disks, paths and limits that a user can fix. Any other OSError is a bug and keeps its traceback.
_PATHS = "EACCES EDQUOT EEXIST EFBIG EISDIR ENAMETOOLONG ENOENT ENOSPC ENOTDIR EPERM EROFS".split()
_MORE_PROCESSES = "raise `ulimit -u`, or the limit of the container"
TROUBLE = {
    **dict.fromkeys(_PATHS, "choose another path"),
    **dict.fromkeys(("EMFILE", "ENFILE"), "raise `ulimit -n`"),
    # A process cannot be started. Locks, which also report it, are handled where they are taken.
    "EAGAIN": _MORE_PROCESSES,
    **dict.fromkeys(("EIO", "ESTALE", "ETIMEDOUT"), "check the disk, or its network, and run the same command again"),
}
# Python's own errors of the surroundings, by their text.
SURROUNDINGS = {
    "can't start new thread": f"no thread can be started: {_MORE_PROCESSES}",
    "Could not determine home directory.": "this user has no home folder: set HOME to a folder that can be written to",
}


def main(arguments: list[str] | None = None, recipe: Callable[..., int] | None = None) -> None:
    """Runs a verb and exits with 0 (done), 1 (clips, checks or an upload failed) or 2 (an error, in one line).

    A stop by a signal is 128 + its number, and 75 is a lost contact to another process.

    Args:
        arguments: the arguments, verb first; None for those of this program.
        recipe: replaces `recipes.train_lora.main`.
    """
    end_with_the_starter()
    spare_the_collector()
    let_segments_grow()
    open_missing_streams()
    slow_bars()
    arguments = sys.argv[1:] if arguments is None else arguments
    # Other libraries import torchao, which warns about every kernel that it was built without.
    for noisy in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    me = name_process(os.environ)
    try:
        import_nothing_from_here()
        keep_compiled_code()
        code = run(arguments, recipe)
        sys.stdout.flush()
        sys.exit(code)
    except MochiTuneError as error:
        print(f"{me}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(USERS_MISTAKE)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and is_reader_gone():
            drop_output()
            sys.exit(128 + signal.SIGPIPE)
        if (what := describe_trouble(error)) is None:
            raise
        print(f"{me}: {what}", file=sys.stderr)
        drop_output()
        sys.exit(USERS_MISTAKE)
    except RuntimeError as error:
        if (what := SURROUNDINGS.get(str(error))) is not None:
            print(f"{me}: {what}.", file=sys.stderr)
            sys.exit(USERS_MISTAKE)
        # Importing torch only to name its exception would slow down every start.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(f"{me}: the GPU is out of memory ({str(error).split('. ')[0]}): {advise(arguments)}.", file=sys.stderr)
        sys.exit(USERS_MISTAKE)
    except KeyboardInterrupt as stop:
        is_run = arguments[:1] == ["train"] and STARTED_HERE not in os.environ
        advice = "; the checkpoints are kept, and the same command continues the run" if is_run else ""
        print(f"{me}: interrupted{advice}", file=sys.stderr)
        sys.exit(stop.args[0] if stop.args else INTERRUPTED)


def describe_trouble(error: OSError) -> str | None:
    """Returns what a user can do about an error of the system, in one line, or None for any other error."""
    if (advice := TROUBLE.get(errno.errorcode.get(error.errno or 0, ""))) is None:
        return None
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    what = "no process can be started" if error.errno == errno.EAGAIN else what
    return f"{printable(' '.join(what.split()))}: {advice}."


def advise(arguments: list[str]) -> str:
    """Returns what to change if a verb ran out of memory in a place that does not say so itself."""
    if arguments[:1] == ["sample"]:
        return (
            "use memory=16gb, or lower sample.num_frames, sample.height or sample.width; to decode, memory.tiles=[2,2]"
        )
    return "use memory=16gb or memory=12gb, or lower data.num_frames, data.height, data.width or train.batch_size"


def run(arguments: list[str], recipe: Callable[..., int] | None = None) -> int:
    """Runs a verb; returns the exit code."""
    verbs: dict[str, Callable[[list[str]], int]] = {
        "split": run_split,
        "filter": run_filter,
        "plan": run_plan,
        "doctor": run_doctor,
        "completion": run_completion,
        "init": run_init,
        "inspect": run_inspect,
        "describe": run_describe,
        "prepare": run_prepare,
        "train": lambda rest: run_train(rest, recipe),
        "replay": run_replay,
        "sample": run_sample,
        "export": run_export,
        "lora": run_lora,
        "weights": run_weights,
        "verify": run_verify,
        "bench": run_bench,
        "demo": run_demo,
        "experiment": run_experiment,
        "toy": run_toy,
        "ui": run_ui,
    }
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] in ("--version", "-V", "version"):
        from importlib.metadata import version

        print(version("mochi-tune"))
        return 0
    if arguments[0] not in verbs:
        import difflib

        near = difflib.get_close_matches(arguments[0], verbs, n=1)
        near = [f"lora {arguments[0]}"] if arguments[0] in LORA_OPTIONS else near
        hint = f"; did you mean {near[0]}?" if near else f": use one of {', '.join(verbs)}."
        raise ConfigError(f"{arguments[0]} is not a verb{hint}")
    check_python(sys.flags.optimize)
    processes = num_processes_here(os.environ)
    if processes == 1:
        drop_rank_variables(os.environ)
    elif arguments[0] not in ("train", "sample", "verify", "bench"):
        raise ConfigError(f"{arguments[0]} runs in one process, and {processes} were started: start it as one process.")
    return verbs[arguments[0]](arguments[1:])


def run_inspect(arguments: list[str]) -> int:
    """Writes a page that shows the data set."""
    outs = [argument for argument in arguments if argument.startswith("out=")]
    if (config := load("inspect", [argument for argument in arguments if argument not in outs])) is None:
        return 0
    if outs and not outs[-1].removeprefix("out="):
        raise ConfigError("out= is empty: name a folder, or leave it out for run_dir/inspect.")
    from mochi_tune.data_prep.inspect_data import main as inspect

    return inspect(config, Path(outs[-1].removeprefix("out=")).expanduser() if outs else None)


def run_prepare(arguments: list[str]) -> int:
    """Encodes videos and captions into the cache."""
    if (config := load("prepare", arguments)) is None:
        return 0
    parallel = config.parallel
    if parallel.engine == "ray":
        prepare_ray()
    elif parallel.num_processes > 1 and uses_gpus(config.device):
        check_gpus(parallel.num_processes)
    from mochi_tune.data_prep.prepare import main as prepare

    return prepare(config)


def run_train(arguments: list[str], recipe: Callable[..., int] | None = None) -> int:
    """Trains or resumes."""
    if (config := load("train", arguments)) is None:
        return 0
    check_push(config)
    from mochi_tune.cli.accelerate import with_accelerate
    from mochi_tune.recipes import train_lora
    from mochi_tune.training.checkpoint import find_checkpoints, last_checkpoint
    from mochi_tune.training.preflight import check
    from mochi_tune.training.resume import find_start

    # A run continues when its terminal or the file of its output is gone.
    PatientStream.use()
    # By default SIGUSR1 would end the process. Until there is something to save, it is ignored.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if STARTED_HERE not in os.environ:
        config = with_accelerate(config, os.environ)
    parallel = config.parallel
    started = check_num_processes(parallel.num_processes, os.environ)
    if config.train.deterministic:
        # cuBLAS reads this at its first use, also in the processes that are started from here.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # The compiler reads this when it is imported, which none of the modules above do. Its option in the program
        # would not reach the threads in which autograd compiles backward passes.
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    if parallel.strategy != "data":
        prepare_deepspeed(config.device)
    # A second signal ends this process and those that it started.
    stops = (signal.SIGINT, signal.SIGTERM)
    checkpoints = Path(config.run_dir) / "checkpoints"
    if started == 1 and parallel.num_processes > 1:
        if recipe is not None:
            raise ConfigError("start a custom recipe by torchrun: leave parallel.num_processes out.")
        # Errors are reported once, here, and not by every process.
        find_start(check(config, parallel.num_processes))
        command = ["train", *arguments]
        try:
            code = start_processes(parallel.num_processes, command, config.device, parallel.timeout_seconds, stops)
        except ParallelError as error:
            raise ParallelError(f"{error} {last_checkpoint(checkpoints)}.") from None
    else:
        with joined(config.device, parallel.timeout_seconds) if started > 1 else contextlib.nullcontext():
            code = (recipe or train_lora.main)(config, started)
    if STARTED_HERE in os.environ and started > 1:
        return tell_the_starter(code)
    is_first = started == 1 or (os.environ.get("RANK") or os.environ.get("SLURM_PROCID")) == "0"
    if code == 0 and is_first:
        return push_trained(config)
    if code == USERS_MISTAKE and is_first and (repo := config.publish.push) is not None:
        waits = "the same command uploads the adapter when it has completed the run"
        print(f"mochi-tune: publish.push={repo}: nothing was uploaded, {waits}", file=sys.stderr)
    if code > USERS_MISTAKE:
        way_on = "goes on from there" if find_checkpoints(checkpoints) else "starts over"
        print(f"mochi-tune: {last_checkpoint(checkpoints)}; the same command {way_on}", file=sys.stderr)
    return code


def run_replay(arguments: list[str]) -> int:
    """Recomputes a refused step; returns 1 if its numbers are not finite again."""
    arguments = [a if is_setting(a) else f"bundle={a}" for a in arguments]
    options = plain_options("replay", arguments, REPLAY_OPTIONS)
    if options is None:
        return 0
    from mochi_tune.recipes.replay import main as replay

    made = replay(Path(options["bundle"]), options["device"])
    for each in made.samples:
        origin = f"; not finite first: {each.origin}" if each.origin else ""
        print(f"{each.clip} (sigma {each.sigma:.3f}): loss {each.loss:.6g}, gradient norm {each.grad_norm:.6g}{origin}")
    then = made.recorded
    print(f"step {then['step']} then: loss {then['loss']:.6g}, gradient norm {then['grad_norm']:.6g}")
    print(f"step {then['step']} now:  loss {made.loss:.6g}, gradient norm {made.grad_norm:.6g}")
    print(f"attention by {made.attention}")
    if made.is_finite and abs(made.loss - then["loss"]) > 0.05 * abs(then["loss"]):
        print("the losses differ by more than rounding: was the run trained by another recipe?")
    return 0 if made.is_finite else 1


def run_sample(arguments: list[str]) -> int:
    """Renders a video."""
    if (config := load("sample", arguments)) is None:
        return 0
    from mochi_tune.recipes.sample import main as sample
    from mochi_tune.recipes.sample_grid import main as sample_grid
    from mochi_tune.recipes.sample_grid import renders_cells
    from mochi_tune.recipes.sample_plan import check
    from mochi_tune.sampling.adapters import check_has_adapter

    check_has_adapter(config.sample, Path(config.run_dir))
    # SVT-AV1 would print forty lines about its settings.
    os.environ.setdefault("SVT_LOG", "1")
    if renders_cells(config):
        if config.parallel.engine == "ray":
            prepare_ray()
        for path in sample_grid(config):
            print(path, flush=True)
        return 0
    started = check_num_processes(config.parallel.num_processes, os.environ)
    if started == 1 and config.parallel.num_processes > 1:
        # Errors are reported once, here, and not by every process.
        check(config, config.parallel.num_processes)
        code = start_processes(
            config.parallel.num_processes, ["sample", *arguments], config.device, config.parallel.timeout_seconds
        )
        if code > USERS_MISTAKE:
            raise KeyboardInterrupt(code)
        return code
    with joined(config.device, config.parallel.timeout_seconds) if started > 1 else contextlib.nullcontext():
        try:
            from tqdm import tqdm

            for video in sample(config):
                # Progress bars end without a line break.
                with tqdm.external_write_mode(sys.stdout):
                    print(f"video: {video}", flush=True)
        except KeyboardInterrupt as stop:
            if STARTED_HERE not in os.environ:
                raise
            # The program that started this process reports the stop once, and exits with this code.
            return tell_the_starter(stop.args[0] if stop.args else INTERRUPTED)
    return 0


if __name__ == "__main__":
    main()
