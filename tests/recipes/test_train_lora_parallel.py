"""`train` in several real processes: the same run as one process with the same global batch."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_golden import GRADIENT_TOLERANCE, TOLERANCE
from helpers_process import run, run_in
from helpers_road import ENVIRONMENT, LORA, read_rows, road
from safetensors.torch import load_file

from mochi_tune.config.load import load_config
from mochi_tune.errors import ConfigError
from mochi_tune.training.preflight import check

STEPS = 14
# The average is kept and given out, and a step that is left out is among them.
COMMON = [a for a in LORA if "dropout" not in a] + [f"train.steps={STEPS}", "train.warmup_steps=0"]
COMMON += ["train.ema_decay=0.9", "train.spike_policy=skip", "train.spike_factor=1.02"]
# Four samples a step, whoever computes them.
ONE = ["train.batch_size=1", "train.accumulation_steps=4"]
TWO = ["train.batch_size=1", "train.accumulation_steps=2", "parallel.num_processes=2"]
LAYOUTS = {
    "data": [*TWO, "parallel=data"],
    "context": [*ONE, "parallel.num_processes=2", "parallel=context"],
    # The six heads go two ways, so that the four processes are two rows in a ring.
    "ring": [*ONE, "parallel.num_processes=4", "parallel=context"],
    "zero2": [*TWO, "parallel=zero2"],
    "zero3": [*TWO, "parallel=zero3"],
}


def train_as(run_dir: Path, *more: str) -> None:
    # Several processes start by fork here; the launchers, ours too, have tests of their own below.
    count = int(dict(setting.split("=") for setting in more).get("parallel.num_processes", 1))
    arguments = ["train", "conf=my_lora", *road(run_dir, *COMMON, *more)]
    done = run(*arguments) if count == 1 else run_in(count, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone")
    train_as(run_dir, *ONE, "train.validate_every=7")
    assert any(row.get("spike") == "skip" for row in read_rows(run_dir / "metrics.jsonl"))
    return run_dir


def assert_same_run(run_dir: Path, alone: Path) -> None:
    """Compares runs whose sums are in another order, by what `verify` promises of fp32: see models/test_rounding.py."""
    ours, theirs = (read_rows(folder / "metrics.jsonl") for folder in (run_dir, alone))
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for mine, its in zip(ours, theirs, strict=True):
        assert all(mine.get(key) == its.get(key) for key in ("clips", "sigmas", "lr", "spike"))
        assert mine["loss"] == pytest.approx(its["loss"], rel=TOLERANCE)
        assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=GRADIENT_TOLERANCE)
    newest = f"checkpoints/step_{STEPS:06d}"
    mine, state = (load_file(folder / newest / "optimizer.safetensors") for folder in (run_dir, alone))
    # The adapter's and nothing else: frozen weights are in no checkpoint.
    assert mine.keys() == state.keys()
    rates = sum(row["lr"] for row in theirs if row.get("spike") != "skip")
    weights = load_file(alone / newest / "adapter.safetensors")
    for name, tensor in state.items():
        tolerance = GRADIENT_TOLERANCE
        if ".lora_A" in name:
            # The gradient of A is a product with B, whose own error comes on top.
            key = name.rpartition("/")[0].replace(".lora_A", ".lora_B")
            b, gradients = weights[key], state[f"{key}/exp_avg_sq"].sqrt()
            tolerance += (adapter_error(gradients, rates).norm() / b.norm()).item()
        # Moments are means of gradients, and of their squares.
        assert (mine[name] - tensor).abs().max() <= 2 * tolerance * tensor.abs().max(), (name, tolerance)
    for name in ("adapter.safetensors", f"{newest}/adapter.safetensors"):
        mine, its = (load_file(folder / name) for folder in (run_dir, alone))
        assert mine.keys() == its.keys() and all(tensor.numel() for tensor in mine.values())
        count = beyond = 0
        for key, tensor in its.items():
            if key.endswith(".alpha"):
                assert torch.equal(mine[key], tensor)
                continue
            bound = adapter_error(state[f"{key}/exp_avg_sq"].sqrt(), rates) + 2**-20 * tensor.abs()
            assert bound.median() < 0.02 * rates, "of most numbers it is small beside what they may move"
            difference = (mine[key] - tensor).abs()
            assert difference.max() <= 2 * rates, key
            count, beyond = count + difference.numel(), beyond + int((difference > bound).sum())
        # Those whose gradient was of the size of its error in one of the steps, which their last moment does not tell:
        # of each step's, about the share 2 e of their usual size.
        assert beyond <= 4 * STEPS * GRADIENT_TOLERANCE * count, (beyond, count)


def adapter_error(gradients: torch.Tensor, rates: float) -> torch.Tensor:
    """Returns how far the numbers of an adapter may be apart after Adam's steps on gradients that are a little apart.

    Adam moves a number by the rate times m / sqrt(v). Where both are off by a gradient's error e, that is off by up to
    2 e / sqrt(v): nothing for a number whose gradients are large, all for one whose gradients are of rounding size.

    Args:
        gradients: the root of Adam's second moment, the usual size of each number's gradient.
        rates: the sum of the learning rates of all steps.
    """
    error = GRADIENT_TOLERANCE * gradients.max()
    # Twice, as both runs' gradients grow with B from step to step: early ones are smaller than the moment tells.
    return rates * (4 * error / gradients.clamp(min=1e-30)).clamp(max=2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_several_processes_make_the_run_of_one(alone, tmp_path, name):
    train_as(tmp_path, *LAYOUTS[name], "train.validate_every=7")
    assert_same_run(tmp_path, alone)
    ours, theirs = (read_rows(folder / "validation.jsonl") for folder in (tmp_path, alone))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["validation_loss"] == pytest.approx(its["validation_loss"], rel=TOLERANCE)
    [state] = (tmp_path / "checkpoints").glob("*/state.json")
    assert json.loads(state.read_text())["settings"]["global_batch"] == 4


@pytest.mark.parametrize(
    "more",
    [
        ["train.batch_size=2"],
        ["parallel.context=2", "train.accumulation_steps=2"],
        ["memory.activations=offload", "train.recompute=block"],
    ],
    ids=["rows", "context", "offload"],
)
def test_zero3_goes_with_unlike_prompts_with_context_and_with_inputs_in_host_memory(tmp_path, more):
    common = ["train.steps=4", "train.caption_dropout=0.5", "train.spike_policy=off"]
    ours, theirs = tmp_path / "zero3", tmp_path / "alone"
    train_as(ours, *common, "train.batch_size=1", *more, "parallel.strategy=zero3", "parallel.num_processes=2")
    train_as(theirs, *common, *(more if "train.batch_size=2" in more else []), "train.accumulation_steps=2")
    rows = [read_rows(folder / "metrics.jsonl") for folder in (ours, theirs)]
    assert len({row["clips"][0] for row in rows[0]}) > 1
    for mine, its in zip(*rows, strict=True):
        assert mine["clips"] == its["clips"]
        assert mine["loss"] == pytest.approx(its["loss"], rel=TOLERANCE)
        assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=GRADIENT_TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        (["parallel=context"], ["lora.dropout=0.2"]),
        (["parallel=zero3"], ["train.recompute=auto", "train.validate_every=2"]),
        (["parallel=zero2"], ["lora.dora=true", "train.sample_every=2", "train.sample_prompts=[a red ball]"]),
        (["parallel=zero2"], ["train.learning_rate_b_ratio=4"]),
    ],
    ids=["dropout", "defaults", "evaluations", "groups"],
)
def test_what_else_a_run_may_have_goes_in_two_processes_as_in_one(tmp_path, layout, more):
    """The launcher alone says how many processes there are: all share the tokens, or each has its samples."""
    ours, theirs = tmp_path / "two", tmp_path / "one"
    more = [*more, "train.steps=3", "train.spike_policy=off", "sample.steps=2"]
    shared = [] if layout == ["parallel=context"] else TWO[:2]
    done = run_in(2, "train", "conf=my_lora", *road(ours, *COMMON, *(shared or ONE), *layout, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    train_as(theirs, *ONE, *more)
    rows = [read_rows(folder / "metrics.jsonl") for folder in (ours, theirs)]
    for mine, its in zip(*rows, strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], rel=TOLERANCE)
        assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=GRADIENT_TOLERANCE)
    names = [sorted(path.name for path in (folder / "samples").iterdir()) for folder in (ours, theirs)]
    assert names[0] == names[1] and bool(names[0]) == ("train.sample_every=2" in more)
    states = [load_file(folder / "checkpoints/step_000003/optimizer.safetensors") for folder in (ours, theirs)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 20


def test_processes_that_share_tokens_have_the_same_samples(alone, tmp_path):
    """Four processes are two pairs: each pair has two of the step's samples and shares their tokens."""
    train_as(tmp_path, *TWO[:2], "train.steps=1", "parallel.num_processes=4", "parallel.context=2")
    mine, its = (read_rows(folder / "metrics.jsonl")[0] for folder in (tmp_path, alone))
    assert len(mine["clips"]) == 4 and mine["clips"] == its["clips"]
    assert mine["loss"] == pytest.approx(its["loss"], rel=TOLERANCE)
    assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=GRADIENT_TOLERANCE)


def test_processes_that_share_tokens_replace_no_clip(tmp_path):
    config = load_config("my_lora", road(tmp_path, *COMMON, "data.damaged=quarantine", "parallel.context=2"))
    with pytest.raises(ConfigError, match=r"data\.damaged=quarantine needs parallel\.context=1"):
        check(config, 2)


def test_a_run_goes_on_with_another_number_of_processes_and_strategy(alone, tmp_path):
    """Two, one, and two by ZeRO: each takes the checkpoint of the one before."""
    train_as(tmp_path, *LAYOUTS["data"], "train.checkpoint_every=2", "train.keep_checkpoints=9")
    for step, layout in ((8, ONE), (4, LAYOUTS["zero3"])):
        for folder in (tmp_path / "checkpoints").iterdir():
            if int(folder.name.removeprefix("step_")) > step:
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
        train_as(tmp_path, *layout, "train.checkpoint_every=2", "train.keep_checkpoints=9")
        assert_same_run(tmp_path, alone)


def test_the_command_starts_its_own_processes(alone, tmp_path):
    done = run("train", "conf=my_lora", *road(tmp_path, *COMMON, *LAYOUTS["data"]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path, alone)


def test_two_machines_of_torchrun_make_the_run_of_one(alone, tmp_path):
    """Each with an agent of its own, which meet at a port, and one process each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=1"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "-m", "mochi_tune.cli", "train"]
    arguments = ["conf=my_lora", *road(tmp_path, *COMMON, *TWO[:2], "parallel=data")]
    environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}
    nodes = [subprocess.Popen([*torchrun, *arguments], env=environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        assert [node.wait() for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    assert_same_run(tmp_path, alone)


@pytest.mark.parametrize("engine", [["--multi_gpu"], ["--use_deepspeed", "--zero_stage=3"]], ids=["data", "deepspeed"])
def test_accelerate_launch_makes_the_run_of_one(alone, tmp_path, engine):
    """On CPUs --multi_gpu is what makes `accelerate launch` start several processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *engine, "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}", "-m", "mochi_tune.cli"]
    arguments = ["train", "conf=my_lora", *road(tmp_path, *COMMON, *TWO[:2])]
    done = subprocess.run([*launch, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path, alone)
    [start] = read_rows(tmp_path / "history.jsonl")
    assert start["processes"] == 2 and start["strategy"] == ("zero3" if "--use_deepspeed" in engine else "data")


def test_another_global_batch_is_another_run(tmp_path):
    train_as(tmp_path, *ONE)
    done = run("train", "conf=my_lora", *road(tmp_path, *COMMON, *ONE, "train.steps=20", "parallel.num_processes=2"))
    assert done.returncode == 2 and "global_batch was 4, is 8" in done.stderr and done.stderr.count("\n") == 1
