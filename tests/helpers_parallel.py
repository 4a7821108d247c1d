"""Runs a function in several processes that talk to one another, as it would run on several GPUs."""

import gc
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imported once, in the process that children are forked from; the last one reads the settings that most of them have.
# PyAV is first, as decord brings libraries of other versions; accelerate asks for DeepSpeed in every training.
PRELOADED = ["av", "peft", "deepspeed", "mochi_tune.recipes.sample", "mochi_tune.recipes.train_lora"]
PRELOADED += ["mochi_tune.recipes.export", "mochi_tune.data_prep.prepare", "mochi_tune.models.text_encoder"]
PRELOADED += ["psutil", "pyarrow.parquet", "pyarrow.pandas_compat", "pandas", "transformers", "helpers_warm"]
# What conftest has chosen for the tests and all that they start; its number decides about bits.
THREADS = int(os.environ["OMP_NUM_THREADS"])


def start_forkserver() -> None:
    """Starts what children are forked from, with all that the tests need, if it is not there.

    Otherwise the first child would choose, which may be one that decodes videos and needs little: the others would
    import for seconds each.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    forkserver.ensure_running()
    restore_path()


def restore_path() -> None:
    """Takes the folder of the tests from PYTHONPATH again: what children start is not to find it."""
    own, _, others = os.environ.pop("PYTHONPATH").partition(os.pathsep)
    assert own == str(Path(__file__).parent)
    if others:
        os.environ["PYTHONPATH"] = others


def use_forkserver(address: str) -> None:
    """Has this process fork its children from a process that another one has started, and ends."""
    server = forkserver._forkserver
    server._forkserver_address, server._forkserver_alive_fd = address, os.open(os.devnull, os.O_WRONLY)
    # The module has a name of its own for the method.
    server.ensure_running = forkserver.ensure_running = lambda: None


def run_ranks(num_ranks: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Calls `function(*arguments)` in each of `num_ranks` new processes; returns what each rank returned, in order."""
    mp.start_processes(_run_rank, (num_ranks, function, folder, arguments), nprocs=num_ranks, start_method="forkserver")
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def _run_rank(rank: int, num_ranks: int, function: Callable[..., Any], folder: Path, arguments: tuple) -> None:
    gc.freeze()
    torch.set_num_threads(THREADS)
    # What a launcher sets, and accelerate reads.
    of_all = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", **{key: str(value) for key, value in of_all.items()}}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_ranks)
    torch.save(function(*arguments), folder / f"rank_{rank}.pt")
    if dist.is_initialized():  # A training leaves it by itself.
        dist.destroy_process_group()
