"""Training with streamed blocks is bitwise equal to training with resident ones, however slow copies or blocks are."""

import gc
import time
import weakref
from dataclasses import replace

import pytest
import torch
from helpers_step import CONFIG, adapt, build, step
from torch._dynamo.utils import counters

from mochi_tune.adapters.lora import lora_parameters
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.parallel.compilation import apply_compilation
from mochi_tune.parallel.memory import apply_block_offload
from mochi_tune.parallel.precision import apply_precision
from mochi_tune.parallel.recompute import HostInputs, apply_activation_checkpointing, apply_mlp_slices
from mochi_tune.parallel.stream import NUM_BUFFERS, ThreadCopier, apply_streaming

CPU = torch.device("cpu")


class SlowCopier(ThreadCopier):
    """Copies tensor by tensor, with pauses."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause, self.count = pause, 0

    def copy(self, targets, sources) -> None:
        self.count += 1
        for target, source in zip(targets, sources, strict=True):
            # During a copy, the buffer holds no valid weights.
            target.view(torch.uint8).fill_(255)
            time.sleep(self.pause)
            super().copy([target], [source])


# More blocks than buffers, so that each buffer has several.
DEPTH = 7


def streamed(copier=None, policy="block", **options) -> AsymmDiT:
    dit = build(**options, depth=DEPTH)
    apply_streaming(dit, CPU, copier)
    apply_activation_checkpointing(dit, [policy] * DEPTH)
    return dit


def assert_same(ours: AsymmDiT, plain: AsymmDiT, **case) -> None:
    for mine, its in zip(step(ours, **case), step(plain, **case), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("policy", ["block", "attention"])
@pytest.mark.parametrize("pauses", [(0.0, 0.0), (0.002, 0.0), (0.0, 0.02)], ids=["", "slow copies", "slow blocks"])
def test_streamed_blocks_train_bit_for_bit_as_resident_ones(policy, pauses):
    plain, dit = build(dropout=0.3, depth=DEPTH), streamed(SlowCopier(pauses[0]), policy, dropout=0.3)
    for block in dit.blocks:
        # In the middle of a block, when it has read only some of its weights.
        block.attn.core.register_forward_hook(lambda *_: time.sleep(pauses[1]))
    for case in ({}, {"text_length": 0}, {"lengths": [5, 2]}):
        assert_same(dit, plain, **case)


@torch.no_grad()
@pytest.mark.parametrize("pauses", [(0.002, 0.0), (0.0, 0.02)], ids=["slow copies", "slow blocks"])
def test_offloaded_blocks_compute_bit_for_bit_as_resident_ones(pauses):
    plain, dit, copier = build(depth=DEPTH), build(depth=DEPTH), SlowCopier(pauses[0])
    apply_block_offload(dit, CPU, copier)
    for block in dit.blocks:
        block.attn.core.register_forward_hook(lambda *_: time.sleep(pauses[1]))
    arguments = torch.randn(1, 12, 2, 4, 6), torch.tensor([0.3]), torch.randn(1, 5, 16), torch.ones(1, 5)
    for passes in range(1, 4):
        assert torch.equal(dit(*arguments), plain(*arguments)) and copier.count == passes * DEPTH


def test_an_evaluation_between_steps_changes_nothing_and_a_pass_may_be_interrupted():
    plain, dit = build(depth=DEPTH), streamed(SlowCopier(0.001))
    arguments = torch.randn(1, 12, 2, 4, 6), torch.tensor([0.3]), torch.randn(1, 5, 16), torch.ones(1, 5)
    for _ in range(2):
        assert_same(dit, plain)
        with torch.no_grad():
            assert torch.equal(dit(*arguments), plain(*arguments))
        handle = dit.blocks[3].attn.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dit(*arguments)
        handle.remove()


def test_each_block_is_copied_once_a_pass_and_not_at_the_turn():
    copier = SlowCopier(0.0)
    dit = streamed(copier)
    counts = []
    for _ in range(3):
        step(dit)
        counts.append(copier.count)
    # Forward, each of the 7 is copied once; backward, all but those in a buffer at the turn; then from the first again.
    assert counts[0] <= 2 * 7 - 2 and counts[2] - counts[1] == counts[1] - counts[0] <= 2 * 7 - NUM_BUFFERS


def test_the_device_holds_the_buffers_and_nothing_else_of_the_blocks():
    dit = build(depth=DEPTH)
    before = {name: p.data_ptr() for name, p in dit.blocks.named_parameters() if ".lora_" not in name}
    whole = sum(p.nbytes for name, p in dit.blocks.named_parameters() if name in before)
    apply_streaming(dit, CPU)
    apply_activation_checkpointing(dit, ["block"] * DEPTH)
    step(dit)
    away = [name for name, p in dit.blocks.named_parameters() if name in before and p.data_ptr() != before[name]]
    assert len({name.split(".")[0] for name in away}) <= NUM_BUFFERS
    assert whole == sum(p.nbytes for name, p in dit.blocks.named_parameters() if ".lora_" not in name)


@pytest.mark.parametrize("precision", ["fp8", "int8", "nf4"])
def test_rounded_blocks_are_streamed_too(precision):
    models = []
    for is_streamed in (False, True):
        torch.manual_seed(0)
        dit = AsymmDiT(replace(CONFIG, depth=DEPTH))
        for block in dit.blocks:
            apply_precision(block, precision)
        adapt(dit)
        if is_streamed:
            apply_streaming(dit, CPU, SlowCopier(0.001))
        apply_activation_checkpointing(dit, ["block"] * DEPTH)
        models.append(dit)
    assert_same(*models)


def test_streamed_blocks_may_be_compiled():
    plain, dit, lines = build(layers=".attn.", depth=DEPTH), build(layers=".attn.", depth=DEPTH), []
    for model in (plain, dit):
        # Fewer tokens than a clip has, so that the graphs contain slices of the layers.
        apply_mlp_slices(model, 5)
    apply_compilation(plain, lines.append, backend="aot_eager")
    apply_activation_checkpointing(plain, ["block"] * DEPTH)
    # Drop the graphs that other tests compiled.
    torch._dynamo.reset()
    counters.clear()
    apply_compilation(dit, lines.append, backend="aot_eager")
    apply_streaming(dit, CPU, SlowCopier(0.001))
    apply_activation_checkpointing(dit, ["block"] * DEPTH)
    step(dit)
    assert counters["stats"]["unique_graphs"] == 2, "one for the last block, and one for all others"
    for case in ({}, {"text_length": 3}):
        assert_same(dit, plain, **case)
    assert lines == [] and lora_parameters(dit)


@pytest.mark.parametrize("policy", ["block", "attention"])
@pytest.mark.parametrize("is_offloaded", [False, True])
def test_a_deleted_model_leaves_nothing_in_memory(policy, is_offloaded):
    dit, device = build(), torch.device("cpu")
    apply_streaming(dit, device)
    apply_activation_checkpointing(dit, [policy] * 3, HostInputs(device) if is_offloaded else None)
    step(dit)
    weight = weakref.ref(dit.blocks[1].get_parameter("attn.qkv_x.base_layer.weight"))
    assert weight() is not None
    del dit
    gc.collect()
    assert weight() is None
