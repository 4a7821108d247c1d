"""What `accelerate launch` passes on: honoured, or refused in a line."""

import json

import pytest

from mochi_tune.cli.accelerate import with_accelerate
from mochi_tune.config.load import load_config
from mochi_tune.errors import ConfigError

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


def strategy(environment: dict[str, str], *settings: str) -> str:
    return with_accelerate(load_config("my_lora", list(settings)), environment).parallel.strategy


def test_the_deepspeed_stage_of_an_accelerate_config_is_the_runs(tmp_path):
    assert strategy({}) == "data"
    # What accelerate passes where nothing was chosen.
    plain = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "False"}
    assert strategy(plain | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, "train.accumulation_steps=4") == "data"
    assert strategy(DEEPSPEED) == "zero2"
    assert strategy(DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}) == "zero3"
    assert strategy(DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "parallel=zero3") == "zero3"
    assert strategy({"ACCELERATE_MIXED_PRECISION": "bf16"}, "model.dtype=bf16") == "data"
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}))
    assert strategy(DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}) == "zero3"


@pytest.mark.parametrize(
    ("environment", "settings", "text"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, [], "asks for FSDP"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, [], "mixed_precision=fp16, which contradicts model.dtype=bf16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, [], "dynamo_backend=inductor"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, [], "contradicts train.accumulation_steps=1"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, [], "gradient_clipping=0.5, which contradicts train.max_grad_norm=1"),
        (DEEPSPEED, ["parallel=zero3"], "stage 2, which contradicts parallel.strategy=zero3"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, [], "stage 1: use 2 or 3"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, [], "offloads DeepSpeed's optimizers"),
        (DEEPSPEED, ["train.optimizer=muon"], "does not fit parallel.strategy=zero2"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"}, [], "nowhere.json"),
    ],
)
def test_an_accelerate_config_that_contradicts_the_run_is_refused(environment, settings, text):
    with pytest.raises(ConfigError) as error:
        strategy(environment, *settings)
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            {"gradient_accumulation_steps": 8},
            "gradient_accumulation_steps=8, which contradicts train.accumulation_steps=1",
        ),
        ({"gradient_clipping": 0.0001}, "gradient_clipping=0.0001, which contradicts train.max_grad_norm=1.0"),
        ({"train_micro_batch_size_per_gpu": 4}, "which contradicts train.batch_size=1"),
        ({"gradient_clipping": "x"}, "gradient_clipping=x, which contradicts"),
        ({"optimizer": {"type": "Adam"}}, "has optimizer=..., which is not used"),
        ({"fp16": {"enabled": True}}, "enables fp16, which contradicts model.dtype=bf16"),
        ({"zero_optimization": None}, "stage 0: use 2 or 3"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_run_is_refused(tmp_path, content, text):
    file = tmp_path / "deepspeed.json"
    environment = DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, **content}))
    with pytest.raises(ConfigError) as error:
        strategy(environment)
    assert text in str(error.value) and "\n" not in str(error.value)
    same = {"gradient_accumulation_steps": "auto", "gradient_clipping": 1.0, "bf16": {"enabled": True}, "fp16": None}
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": None}, **same}))
    assert strategy(environment) == "zero2"
