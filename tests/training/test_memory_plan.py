"""A training gets the memory plan that fits the free memory, or is refused with settings that fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_road import LORA, road, train

from mochi_tune.config.load import load_config
from mochi_tune.errors import ConfigError, TrainingError
from mochi_tune.models.dit import DiTConfig
from mochi_tune.parallel.forecast import GIB, SPARE_BYTES, Step
from mochi_tune.training import preflight, run
from mochi_tune.training.memory_plan import PLACES, arrange, check_streaming, explain_out_of_memory

STEP = Step(DiTConfig(), 7 * 1590, 71_000_000)


def arrangement(gib: float, dit: str = "auto", step: Step = STEP) -> tuple[bool, bool]:
    plan = arrange(step, dit, "keep", int(gib * GIB))
    held = step.held(plan.recompute, plan.is_streamed, plan.offloads_inputs)
    assert sum(held.values()) + SPARE_BYTES <= gib * GIB
    return plan.is_streamed, plan.offloads_inputs


def needed(step: Step, gib: float) -> float:
    return (sum(step.held(step.policies(int(gib * GIB), True), True).values()) + SPARE_BYTES) / GIB


@pytest.mark.parametrize(("strategy", "text"), [("zero2", "zero2 keeps on the GPU"), ("zero3", "zero3 splits")])
def test_weights_that_deepspeed_takes_are_not_streamed(strategy, text):
    for dit in ("stream", "offload"):
        with pytest.raises(ConfigError, match=rf"{text} the weights that memory.dit={dit} takes from the GPU"):
            check_streaming(dit, strategy, "auto")


def test_auto_takes_the_fastest_that_fits():
    assert arrangement(80) == arrangement(24) == (False, False)
    assert arrangement(12) == (True, False)
    assert arrangement(6) == (True, True)
    assert arrange(STEP, "auto", "keep", None).is_streamed is False
    assert arrangement(24, step=replace(STEP, may_stream=False)) == (False, False)
    # With train.recompute=none, nothing can be streamed.
    with pytest.raises(ConfigError, match="this training needs"):
        arrangement(12, step=replace(STEP, recompute="none"))


def test_what_does_not_fit_is_refused_with_what_does():
    with pytest.raises(ConfigError) as refused:
        arrangement(16, "resident")
    text = str(refused.value)
    assert "and 16.0 GiB are free: use model.precision=int8 (" in text and "or memory=16gb (" in text
    assert text.count("\n") == 0 and "weights 13.6" in text
    # The settings that the error names fit.
    assert arrangement(16, "resident", replace(STEP, precision="int8")) == (False, False)
    assert arrangement(16, "stream") == (True, False)
    # All estimates have the same reserve.
    assert f"memory=16gb ({needed(STEP, 16):.1f} GiB)" in text
    with pytest.raises(ConfigError, match=r"lower data\.num_frames, .* or train\.batch_size, or use a GPU"):
        arrangement(2, "stream")


def test_a_run_that_is_too_large_is_refused_before_a_weight_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "free_bytes", lambda _device: GIB)
    plan = preflight.check(load_config("my_lora", road(tmp_path, *LORA)), 1)
    with pytest.raises(ConfigError, match=r"this training needs 1\.3 GiB of the GPU .* and 1\.0 GiB are free: lower"):
        _ = plan.memory
    monkeypatch.setattr(preflight, "free_bytes", lambda _device: 2 * GIB)
    plan = preflight.check(load_config("my_lora", road(tmp_path, *LORA, "memory=auto")), 1)
    assert plan.memory.recompute == ["none"] * 2 and not plan.memory.is_streamed


def test_out_of_memory_of_the_eval_prompts_is_not_laid_on_the_step():
    def encode_eval_prompts() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB. More is said here")

    with pytest.raises(TrainingError) as explained, explain_out_of_memory(STEP, arrange(STEP, "auto", "keep", None)):
        encode_eval_prompts()
    text = str(explained.value)
    assert "while T5 encoded the eval prompts" in text and "train.sample_every=0" in text
    assert "recompute" not in text and "held are" not in text


def test_the_places_of_out_of_memory_errors_are_functions_of_the_training():
    package = Path(run.__file__).parents[1]
    source = "".join(path.read_text() for room in ("training", "weights") for path in (package / room).glob("*.py"))
    assert [name for name in PLACES if f"def {name}(" not in source] == []


def test_out_of_memory_says_where_what_was_held_and_what_to_change():
    def backward():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB. More is said here")

    plan = arrange(STEP, "resident", "keep", None)
    with pytest.raises(TrainingError) as explained, explain_out_of_memory(STEP, plan):
        backward()
    text = str(explained.value)
    assert "in the backward pass of a step (CUDA out of memory)" in text and "adapter 0.3" in text
    assert "use train.recompute=block or model.precision=int8 (" in text and "or memory=16gb (" in text


@pytest.mark.parametrize(
    ("more", "saved"),
    [([], 3), (["train.optimizer=muon"], 2), (["train.ema_decay=0.9"], 4), (["train.optimizer=adafactor"], 1.07)],
)
def test_space_is_looked_for_as_a_checkpoint_takes_it(tmp_path, monkeypatch, more, saved):
    asked = []
    monkeypatch.setattr(run, "check_free_space", lambda _folder, size: asked.append(size))
    more = [*LORA, "train.steps=1", "train.warmup_steps=0", *more]
    plan = preflight.check(load_config("my_lora", road(tmp_path, *more)), 1)
    assert train(tmp_path, *more[len(LORA) :]) == 0
    assert asked == [int(saved * plan.adapter_bytes)]
