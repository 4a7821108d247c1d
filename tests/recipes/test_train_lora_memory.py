"""Training in less memory: a rounded base is another run, everything else the same run."""

import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from helpers_golden import TOLERANCE
from helpers_parallel import run_ranks
from helpers_process import run_in_two
from helpers_road import LORA, read_rows, road, train
from safetensors.torch import load_file

from mochi_tune.config.load import load_config
from mochi_tune.errors import ConfigError, TrainingError
from mochi_tune.recipes.train_lora import main
from mochi_tune.training import preflight
from mochi_tune.training.accelerator import host_memory
from mochi_tune.training.memory_plan import check_host_memory

MORE = ["train.steps=4", "train.checkpoint_every=2", "train.warmup_steps=0", "train.learning_rate=1e-3"]


def losses(run_dir) -> list[float]:
    return [row["loss"] for row in read_rows(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("precision", ["fp8", "int8", "nf4"])
def test_a_rounded_base_trains_near_the_whole_one_and_resumes_bit_for_bit(tmp_path, precision):
    common = [*MORE, "train.validate_every=2", "train.recompute=block"]
    more = [*common, f"model.precision={precision}"]
    assert train(tmp_path / "whole", *common) == 0
    assert train(tmp_path / "run", *more) == 0
    whole, rounded = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert rounded == pytest.approx(whole, rel=0.1) and rounded != whole
    straight = load_file(tmp_path / "run" / "adapter.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in straight.values())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004")
    assert train(tmp_path / "run", *more) == 0
    assert train(tmp_path / "streamed", *more, "memory=16gb") == 0
    for name in ("run", "streamed"):
        again = load_file(tmp_path / name / "adapter.safetensors")
        assert losses(tmp_path / name) == rounded
        assert all(torch.equal(again[key], tensor) for key, tensor in straight.items())


@pytest.mark.parametrize("preset", ["memory=24gb", "memory=16gb", "memory=12gb"])
def test_memory_presets_train_the_same_bits_and_a_resume_may_choose_another(tmp_path, capsys, preset):
    more = [*MORE, "train.validate_every=2", "train.recompute=attention"]
    assert train(tmp_path / "plain", *more) == 0
    assert train(tmp_path / "run", *more, preset) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    ours, theirs = (load_file(tmp_path / name / "adapter.safetensors") for name in ("run", "plain"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004")
    capsys.readouterr()
    assert train(tmp_path / "run", *more) == 0
    assert "since step 2 memory.dit was" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_two_processes_stream_the_same_run(tmp_path):
    more = [*MORE, "lora.dropout=0"]
    assert train(tmp_path / "one", *more, "train.accumulation_steps=2") == 0
    two = ["memory=12gb", "train.recompute=block", "parallel=data", "parallel.num_processes=2"]
    done = run_in_two("train", "conf=my_lora", *road(tmp_path / "two", *LORA, *more, *two))
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=TOLERANCE)


def test_weights_that_host_memory_cannot_take_are_refused():
    check_host_memory(2**30, 2**30)
    with pytest.raises(ConfigError, match=r"5\.0 GiB free, but 18\.7 GiB of weights and blocks' inputs need to stay"):
        check_host_memory(int(18.7 * 2**30), 5 * 2**30)


def share_host() -> tuple[int, int]:
    PartialState(cpu=True)  # As `joined` does.
    return host_memory()


def test_each_process_of_a_machine_has_weights_of_its_own_in_host_memory(tmp_path, monkeypatch):
    (free, num_sharing), other = run_ranks(2, share_host, tmp_path)
    assert num_sharing == 2 and other == (free, 2) and free > 0
    # As on a machine with GPUs that has room for one process.
    more = ["memory=16gb", "train.recompute=block"]
    plan = preflight.check(load_config("my_lora", road(tmp_path / "run", *LORA, *more)), 1)
    plan = replace(plan, device=torch.device("cuda"))
    room = plan.step.weights["modulation"] + plan.step.host_bytes(is_streamed=True, is_offloaded=False)
    monkeypatch.setattr(preflight, "free_bytes", lambda _device: 80 * 2**30)
    monkeypatch.setattr(preflight, "host_memory", lambda: (room, 2))
    with pytest.raises(ConfigError, match=r"for each of 2 processes: free some, .* fewer processes a machine"):
        _ = plan.memory
    monkeypatch.setattr(preflight, "host_memory", lambda: (room, 1))
    assert plan.memory.is_streamed


def test_a_run_goes_on_with_another_precision_by_force_only(tmp_path):
    assert train(tmp_path, *MORE, "model.dtype=bf16") == 0
    more = [*MORE, "model.dtype=bf16", "train.steps=5"]
    with pytest.raises(TrainingError, match=r"model.precision was null, is fp8.*resume=force"):
        train(tmp_path, *more, "model.precision=fp8")
    assert train(tmp_path, *more, "model.precision=bf16", "resume=force") == 0, "as null"
    assert train(tmp_path, *more, "model.precision=fp8", "train.steps=6", "resume=force") == 0


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["model.precision=bf16"], "contradicts model.dtype=fp32: use model.dtype=bf16"),
        (["model.precision=int8", "lora.dora=true"], "lora.dora=true measures rows of the base"),
        (["model.precision=fp8", "parallel=zero3"], "use parallel.strategy=data or zero2"),
        (["model.precision=fp6"], "model.precision=fp6 is not possible"),
        (
            ["memory=16gb", "train.recompute=none"],
            "train.recompute=none keeps the weights that memory.dit=stream",
        ),
        (["memory=8gb"], "memory=8gb does not exist: use one of 12gb, 16gb, 24gb, 48gb, 80gb"),
    ],
)
def test_a_precision_that_does_not_fit_is_refused(tmp_path, more, text):
    with pytest.raises(ConfigError) as error:
        main(load_config("my_lora", road(tmp_path, *LORA, *more)))
    assert text in str(error.value)
