"""Training in less memory: a rounded base is another run, everything else the same run."""

import shutil

import pytest
import torch
from helpers_road import LORA, read_rows, road, train
from safetensors.torch import load_file

from mochi_tune.config.load import load_config
from mochi_tune.errors import ConfigError, TrainingError
from mochi_tune.recipes.train_lora import main

MORE = ["train.steps=4", "train.checkpoint_every=2", "train.warmup_steps=0", "train.learning_rate=1e-3"]


def losses(run_dir) -> list[float]:
    return [row["loss"] for row in read_rows(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("precision", ["fp8", "int8", "nf4"])
def test_a_rounded_base_trains_near_the_whole_one_and_resumes_bit_for_bit(tmp_path, precision):
    assert train(tmp_path / "whole", *MORE) == 0
    assert train(tmp_path / "run", *MORE, f"model.precision={precision}") == 0
    whole, rounded = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert rounded == pytest.approx(whole, rel=0.1) and rounded != whole
    straight = load_file(tmp_path / "run" / "adapter.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in straight.values())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004")
    assert train(tmp_path / "run", *MORE, f"model.precision={precision}") == 0
    resumed = load_file(tmp_path / "run" / "adapter.safetensors")
    assert losses(tmp_path / "run") == rounded
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


def test_a_run_goes_on_with_another_precision_by_force_only(tmp_path):
    assert train(tmp_path, *MORE, "model.dtype=bf16") == 0
    more = [*MORE, "model.dtype=bf16", "train.steps=5"]
    with pytest.raises(TrainingError, match=r"model.precision was None, is fp8.*resume=force"):
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
    ],
)
def test_a_precision_that_does_not_fit_is_refused(tmp_path, more, text):
    with pytest.raises(ConfigError) as error:
        main(load_config("my_lora", road(tmp_path, *LORA, *more)))
    assert text in str(error.value)
