"""Compares the forecast with every measured full-size row of docs/benchmarks.md."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mochi_tune.config.settings import known_keys
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.latents import num_visual_tokens
from mochi_tune.parallel.forecast import (
    CARDS,
    GIB,
    OPTIMIZER_STATES,
    SPARE_BYTES,
    Step,
    bytes_on_device,
    encoding_held,
    encoding_seconds,
    short_seconds,
    weight_bytes,
)
from mochi_tune.parallel.forecast_sampling import (
    MAX_ONE_BATCH_TOKENS,
    SamplingStep,
    decoding_held,
    decoding_seconds,
    sampling_held,
    sampling_seconds,
)
from mochi_tune.training.optim import LIBRARIES, build_optimizer, optimizer_state

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
HEIGHT, WIDTH = 480, 848
FULL = DiTConfig()
# The fp32 parameters of a LoRA of rank 16 on the attention layers.
ADAPTER_BYTES = 71e6


def measured() -> list[list[str]]:
    """Returns the rows of the table that begins with "| work |"."""
    lines = PAGE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| work |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    raise AssertionError("the page ends with the table")


def estimated(work: str, frames: int) -> tuple[float, dict[str, int]]:
    """Returns the estimated seconds and bytes of a row's work on an H200."""
    card, tokens = CARDS["h200"], num_visual_tokens(frames, HEIGHT, WIDTH)
    if work.startswith("sample"):
        dit = work.removeprefix("sample").removeprefix(", ") or "resident"
        return sampling_seconds(SamplingStep(FULL, tokens, dit), card), sampling_held(FULL, tokens, dit)
    if work == "decode":
        return decoding_seconds(frames, HEIGHT, WIDTH, card), decoding_held(HEIGHT, WIDTH)
    if work == "encode":
        return encoding_seconds(frames, HEIGHT, WIDTH, card), encoding_held(frames, HEIGHT, WIDTH)
    train, kind, policy, precision, *where = work.split(", ")
    assert train == "train" and where in ([], ["modulation on the GPU"], ["16gb"], ["12gb"]), work
    step = Step(
        FULL, tokens, int(ADAPTER_BYTES), precision=precision, recompute=policy, is_compiled=kind == "compiled",
        holds_modulation=where == ["modulation on the GPU"],
    )  # fmt: skip
    free = int(card.gib * GIB) if policy == "auto" else None
    policies, is_streamed, is_offloaded = step.policies(free), where in (["16gb"], ["12gb"]), where == ["12gb"]
    return step.seconds(policies, card, is_streamed), step.held(policies, is_streamed, is_offloaded)


def test_every_measured_row_is_estimated_within_a_tenth():
    rows = measured()
    assert len(rows) >= 30
    for work, frames, seconds, gib in rows:
        ours_seconds, held = estimated(work, int(frames))
        assert ours_seconds == pytest.approx(float(seconds), rel=0.1), (work, frames)
        assert sum(held.values()) / GIB == pytest.approx(float(gib), rel=0.1), (work, frames)


def test_blocks_keep_their_attention_as_far_as_memory_goes():
    step = Step(FULL, 7 * 1590)
    # Measured at full size, see docs/benchmarks.md.
    assert sum(step.weights.values()) / GIB == pytest.approx(18.7, abs=0.1)
    assert step.weights["modulation"] / GIB == pytest.approx(5.1, abs=0.1)
    resident, streamed = (bytes_on_device(step.weights, FULL, is_streamed) for is_streamed in (False, True))
    assert streamed < 0.08 * resident + step.weights["rest"]
    assert weight_bytes(FULL, 2, "fp8")["blocks"] < 0.65 * step.weights["blocks"]
    seen = []
    for gib in (12, 16, 19, 20, 24, 28, 48, 80):
        policies = step.policies(gib * GIB)
        assert len(policies) == 48
        if set(policies) != {"block"}:
            assert sum(step.held(policies).values()) + SPARE_BYTES <= gib * GIB
        seen.append([policies.count(policy) for policy in ("block", "attention", "none")])
    # More memory means less recomputation. A block keeps everything only if all blocks keep their attention.
    assert seen == sorted(seen, key=lambda count: (-count[0], count[2])), seen
    assert seen[0] == [48, 0, 0] and seen[-1] == [0, 0, 48] and [0, 48, 0] in seen, seen
    assert any(block and attention for block, attention, _ in seen) and any(0 < whole < 48 for *_, whole in seen)
    assert not any(block and whole for block, _, whole in seen), seen


def test_nothing_is_kept_whole_where_that_cannot_be_or_was_not_measured():
    step, free = Step(FULL, 7 * 1590), 500 * GIB
    assert set(step.policies(free)) == {"none"}
    for arrangement in ((True, False), (False, True)):
        assert set(step.policies(free, *arrangement)) == {"attention"}
    assert set(replace(step, is_compiled=False).policies(free)) == {"attention"}
    for some in (None, free):
        assert set(replace(step, num_shards=2).policies(some)) == {"block"}
    assert replace(step, recompute="block").policies(0) == ["block"] * 48


def test_weights_are_counted_as_the_model_has_them():
    config = DiTConfig(depth=3, num_heads=4, hidden_size_x=64, hidden_size_y=32, t5_feat_dim=16)
    weights = weight_bytes(config, 4)
    with torch.device("meta"):
        assert sum(weights.values()) == 4 * sum(p.numel() for p in AsymmDiT(config).parameters())


def test_saving_memory_takes_time():
    step, card = Step(FULL, 28 * 1590), CARDS["4090"]
    attention, block = ["attention"] * 48, ["block"] * 48
    held = [step.held(attention), step.held(block), step.held(block, True), step.held(block, True, True)]
    totals = [sum(each.values()) for each in held]
    assert totals == sorted(totals, reverse=True)
    assert step.seconds(block, card) > step.seconds(attention, card)
    assert replace(step, precision="fp8").seconds(block, card) < step.seconds(block, card)
    # Each clip of a batch attends only to itself: two take twice the time of one, less than one of twice the length.
    one, two = replace(step, num_tokens=step.num_tokens // 2), replace(step, num_clips=2)
    assert two.seconds(block, card) == pytest.approx(2 * one.seconds(block, card), rel=0.01)
    assert two.seconds(block, card) < 0.9 * step.seconds(block, card)
    # With few tokens, copying the weights takes longer than the arithmetic.
    short = replace(step, num_tokens=64)
    assert short.seconds(block, card, is_streamed=True) == 2 * step.weights["blocks"] / card.host
    assert step.seconds(block, card, is_streamed=True) == step.seconds(block, card)
    shares = [sum(sampling_held(FULL, 1590, dit).values()) for dit in ("resident", "fp8", "offload")]
    assert shares == sorted(shares, reverse=True)


def test_sampling_holds_what_depends_on_how_blocks_run():
    tokens, mib = num_visual_tokens(163, HEIGHT, WIDTH), 2**20
    compiled, eager = (sampling_held(FULL, tokens, "fp8", is_compiled=each) for each in (True, False))
    # docs/sampling.md: 15.0 GiB were measured.
    assert sum(eager.values()) / GIB == pytest.approx(15.0, rel=0.05) and compiled["weights"] == eager["weights"]
    assert sampling_held(FULL, tokens, "resident", is_compiled=False) == sampling_held(FULL, tokens, "resident")
    # Both passes of guidance are one batch: counted at full size, 1.44 GiB for 37 frames and 1.95 for 49.
    for frames, gib in ((37, 1.44), (49, 1.95)):
        short = sampling_held(FULL, num_visual_tokens(frames, HEIGHT, WIDTH), "offload")["largest block"]
        assert short / GIB == pytest.approx(gib, rel=0.1)
    few, many = (sampling_held(FULL, MAX_ONE_BATCH_TOKENS - less, "stream")["largest block"] for less in (1, 0))
    assert few == pytest.approx(2 * many, abs=mib)


@pytest.mark.parametrize("size, tiles, gib", [
    ((480, 848), (1, 1), 5.7), ((480, 848), (1, 2), 2.2), ((480, 848), (2, 2), 1.7), ((480, 848), (3, 3), 1.3),
    ((720, 1280), (1, 1), 11.8), ((720, 1280), (1, 2), 3.9), ((720, 1280), (2, 2), 2.6), ((720, 1280), (3, 3), 1.7),
])  # fmt: skip
def test_the_decoder_holds_what_was_counted_on_tensors_without_data(size, tiles, gib):
    assert sum(decoding_held(*size, tiles).values()) / GIB == pytest.approx(gib, abs=0.1)


def test_zero3_splits_the_weights_and_two_offloaded_inputs_are_on_the_device():
    step, policies = Step(FULL, 28 * 1590), ["block"] * 48
    held = step.held(policies)
    assert replace(step, num_shards=4).held(policies)["weights"] == held["weights"] // 4
    assert step.held(policies, is_streamed=True, is_offloaded=True)["kept"] == 2 * held["kept"] // 48


def test_pinned_host_memory_is_counted_by_powers_of_two():
    config = DiTConfig(depth=4, hidden_size_x=96, hidden_size_y=48, num_heads=4)
    with torch.device("meta"):
        blocks = AsymmDiT(config).blocks
    sizes = [2 * p.numel() for name, p in blocks.named_parameters() if ".mod_" not in name]
    pinned = sum(next(2**n for n in range(40) if 2**n >= size) for size in sizes)
    step = Step(config, 1000, 0)
    assert step.host_bytes(is_streamed=True, is_offloaded=False) == pinned > sum(sizes) == step.weights["blocks"]
    # An input has 1000 x 96 numbers of 2 bytes.
    assert step.host_bytes(is_streamed=True, is_offloaded=True) == pinned + 4 * 2**18
    assert step.host_bytes(is_streamed=False, is_offloaded=False) == 0


def is_here(optimizer: str) -> bool:
    """Whether the optimizer is installed and runs on a CPU."""
    library = LIBRARIES.get(optimizer)
    return optimizer != "adamw_8bit" and (library is None or importlib.util.find_spec(library) is not None)


def test_an_adapter_is_held_with_what_its_optimizer_keeps():
    optimizers = known_keys()["train.optimizer"].choices
    assert OPTIMIZER_STATES.keys() == {*optimizers}
    policies, shapes = ["block"] * FULL.depth, {"A": (16, 3072), "B": (3072, 16)}
    for optimizer in filter(is_here, optimizers):
        parameters = {f"{n}.lora_{n}": torch.nn.Parameter(torch.randn(size)) for n, size in shapes.items()}
        built = build_optimizer(optimizer, parameters, 1e-3, 0.01, 1, "cpu")
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        built.step()
        state, _ = optimizer_state(built, parameters)
        kept = sum(t.numel() * t.itemsize for tensors in state.values() for t in tensors.values())
        size = sum(4 * parameter.numel() for parameter in parameters.values())
        step = Step(FULL, 1590, size, optimizer=optimizer)
        # An upper bound: Prodigy does not store a start that is 0, and Adafactor stores less for wider layers.
        assert step.held(policies)["adapter"] == pytest.approx(2 * size + kept, rel=0.02), optimizer
        # Schedule-free trains other weights than those used for evaluation; both are saved.
        kept += size if optimizer == "schedule_free" else 0
        assert step.checkpoint_bytes == pytest.approx(size + kept, rel=0.02), optimizer
    step = Step(FULL, 1590, 1000)
    assert replace(step, has_average=True).held(policies)["adapter"] == 5000 == step.held(policies)["adapter"] + 1000
    assert replace(step, has_average=True).checkpoint_bytes == 4000
    assert replace(step, optimizer="schedule_free").checkpoint_bytes == 4000
    assert replace(step, optimizer="schedule_free").held(policies)["adapter"] == 4000


def test_a_pass_takes_at_least_as_long_as_the_copy_of_its_weights():
    card, few, many = CARDS["4090"], SamplingStep(FULL, 64), SamplingStep(FULL, 44520)
    blocks, whole = Step(FULL, 64).weights["blocks"], sampling_seconds(many, card)
    for dit in ("offload", "stream"):
        assert sampling_seconds(replace(few, dit=dit), card) == 2 * blocks / card.host > sampling_seconds(few, card)
        assert sampling_seconds(replace(few, dit=dit, passes=1), card) == blocks / card.host
        # With many tokens, the arithmetic takes longer than the copy.
        assert sampling_seconds(replace(many, dit=dit), card) == whole
    assert sampling_seconds(replace(many, passes=1, num_sharing=2), card) == pytest.approx(whole / 4)


def test_seconds_have_no_exponent():
    assert [short_seconds(each) for each in (2654.3, 12.34, 3.94, 0.56, 0.00123, 0.00002)] == [
        "2654 s", "12 s", "3.9 s", "0.56 s", "0.0012 s", "under 0.0001 s",
    ]  # fmt: skip
