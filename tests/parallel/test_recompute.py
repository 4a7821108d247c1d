"""Recomputing and compiling do not change the results of a training step; few graphs are compiled."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers_golden import GRADIENT_TOLERANCE, TOLERANCE, relative_error
from helpers_memory import TensorMemory
from helpers_step import CONFIG, adapt, build, step
from torch._dynamo.utils import counters

from mochi_tune.adapters.layers import LoraLayer
from mochi_tune.adapters.lora import apply_adapter, linear_shapes, switch_adapters
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.parallel.compilation import MAX_GRAPHS, apply_compilation
from mochi_tune.parallel.precision import apply_precision
from mochi_tune.parallel.recompute import POLICIES, HostInputs, apply_activation_checkpointing, apply_mlp_slices

SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Count(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the calls of an operation."""

    def __init__(self, operation) -> None:
        super().__init__()
        self.operation, self.calls = operation, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is self.operation
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policies", [*([policy] * 3 for policy in POLICIES), ["block", "attention", "none"]])
def test_every_policy_gives_the_same_bits_with_dropout_too(policies):
    plain, dit = build(dropout=0.3), build(dropout=0.3)
    apply_activation_checkpointing(dit, policies)
    for case in ({}, {"text_length": 0}, {"lengths": [5, 2]}):
        for ours, theirs in zip(step(dit, **case), step(plain, **case), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("policy", ["block", "attention"])
def test_inputs_that_wait_in_host_memory_give_the_same_bits_and_leave_the_device(policy):
    plain, dit, inputs = build(dropout=0.3, depth=5), build(dropout=0.3, depth=5), HostInputs(torch.device("cpu"))
    apply_activation_checkpointing(dit, [policy] * 5, inputs)
    for case in ({}, {"text_length": 0}, {"lengths": [5, 2]}, {"num_latent_frames": 1}):
        for ours, theirs in zip(step(dit, **case), step(plain, **case), strict=True):
            assert torch.equal(ours, theirs)
    given = []
    for block in dit.blocks:
        block.register_forward_pre_hook(lambda _, arguments: given.append(weakref.ref(arguments[0])))
    arguments = torch.randn(1, 12, 2, 4, 6), torch.tensor([0.3]), torch.randn(1, 5, 16), torch.ones(1, 5)
    velocity = dit(*arguments)
    assert len(given) == 5 and not any(reference() is not None for reference in given)
    velocity.sum().backward()
    assert not inputs.given and not inputs.waiting and not inputs.fetched
    # Inputs that an interrupted pass leaves are not used by the next one.
    handle = dit.blocks[2].attn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dit(*arguments)
    handle.remove()
    with torch.no_grad():
        dit(*arguments)
    for ours, theirs in zip(step(dit), step(plain), strict=True):
        assert torch.equal(ours, theirs)


def test_inputs_wait_for_blocks_that_train_nothing_of_the_visual_stream():
    plain, dit = build(layers=".mlp_y."), build(layers=".mlp_y.")
    apply_activation_checkpointing(dit, ["block"] * 3, HostInputs(torch.device("cpu")))
    for ours, theirs in zip(step(dit), step(plain), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("policy", ["block", "attention"])
def test_inputs_wait_for_blocks_that_stay_on_the_device_and_are_compiled(policy):
    plain, dit, lines = build(), build(), []
    apply_activation_checkpointing(dit, [policy] * 3, HostInputs(torch.device("cpu")))
    apply_compilation(dit, lines.append, backend="aot_eager")
    for case in ({}, {"text_length": 0}, {"lengths": [5, 2]}):
        for ours, theirs in zip(step(dit, **case), step(plain, **case), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
    assert lines == []


@pytest.mark.parametrize("policy", POLICIES)
def test_feed_forward_layers_in_slices_give_the_same_numbers(policy):
    plain, dit = build(dropout=0.0), build(dropout=0.0)
    apply_mlp_slices(dit, 5)
    apply_activation_checkpointing(dit, [policy] * 3)
    for case in ({}, {"text_length": 0}, {"num_latent_frames": 3, "lengths": [5, 2]}):
        for i, (ours, theirs) in enumerate(zip(step(dit, **case), step(plain, **case), strict=True)):
            error = (ours - theirs).abs().max() if not theirs.any() else relative_error(ours, theirs)
            assert error <= (GRADIENT_TOLERANCE if i else TOLERANCE)


def test_feed_forward_layers_with_dropout_are_not_sliced():
    plain, dit = build(dropout=0.3), build(dropout=0.3)
    apply_mlp_slices(dit, 5)
    assert all(map(torch.equal, step(dit), step(plain)))


def test_slices_of_a_feed_forward_layer_hold_less():
    with torch.device("meta"):
        block = AsymmDiT(replace(CONFIG, hidden_size_x=512, num_heads=4)).blocks[0]
    x = torch.empty(1, 4000, 512, device="meta", requires_grad=True)
    peaks = []
    for num_tokens in (4000, 500):
        apply_mlp_slices(SimpleNamespace(blocks=[block]), num_tokens)
        with TensorMemory() as memory:
            block.mlp_x(x).sum().backward()
        peaks.append(memory.peak)
        x.grad = None
    # An eighth of the inside of the layer, and a few copies of the stream.
    assert peaks[1] < 0.5 * peaks[0], peaks


def test_attention_is_computed_once_where_it_is_kept_and_twice_where_it_is_not():
    for policy, calls in (("none", 3), ("attention", 3), ("block", 6)):
        dit = build()
        apply_activation_checkpointing(dit, [policy] * 3)
        with Count(SDPA) as count:
            step(dit)
        assert count.calls == calls + 1, f"{policy}: the prompt is pooled by attention once more"


@pytest.mark.parametrize(
    ("policy", "backend", "buckets"),
    [
        ("attention", "aot_eager_decomp_partition", {2: (5, 7, 2)}),
        ("block", "aot_eager_decomp_partition", {2: (5, 7)}),
        # Nothing is recomputed, so the fast "eager" backend, which only captures, suffices.
        ("none", "eager", {2: (5, 7, 2, 0), 3: (4,)}),
    ],
    ids=["attention", "block", "none"],
)
def test_compiled_blocks_take_prompts_of_any_length_and_share_their_graphs(policy, backend, buckets):
    dit, plain, lines = build(layers=".attn."), build(layers=".attn."), []
    apply_activation_checkpointing(dit, [policy] * 3)
    # This tests what torch captures and partitions; the backend does not matter.
    apply_compilation(dit, lines.append, only_training=True, backend=backend)
    counters.clear()
    torch._dynamo.reset()
    graphs = 0
    for frames, lengths in buckets.items():
        for length in lengths:
            case = {"num_latent_frames": frames, "text_length": length}
            for i, (ours, theirs) in enumerate(zip(step(dit, **case), step(plain, **case), strict=True)):
                # Without a prompt, adapters of the text stream have no gradient.
                error = (ours - theirs).abs().max() if not theirs.any() else relative_error(ours, theirs)
                assert error <= (GRADIENT_TOLERANCE if i else TOLERANCE)
        # Two kinds of block, with a prompt and without.
        graphs += 4 if 0 in lengths else 2
        assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"] and lines == []
    with torch.no_grad():
        dit(torch.zeros(1, 12, 5, 4, 6), torch.tensor([0.3]), torch.zeros(1, 3, 16), torch.ones(1, 3))
    step(dit, lengths=[5, 2])
    assert counters["stats"]["unique_graphs"] == graphs, "evaluation and prompts of different lengths compile nothing"
    assert not [name for name, _ in dit.named_parameters() if "_orig_mod" in name or "module." in name]


@torch.no_grad()
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_compiled_blocks_keep_what_their_policy_says(precision):
    kept = {}
    for policy in ("block", "attention"):
        dit = AsymmDiT(CONFIG).requires_grad_(False)
        for block in dit.blocks:
            apply_precision(block, precision)
        adapt(dit, layers=".attn.")
        apply_activation_checkpointing(dit, [policy] * 3)
        apply_compilation(dit, pytest.fail, backend="aot_eager_decomp_partition")
        storages: dict[int, int] = {}

        def note(tensor, storages=storages):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            dit(torch.randn(1, 12, 5, 8, 12), torch.tensor([0.3]), torch.randn(1, 5, 16), torch.ones(1, 5)).sum()
        weights = {parameter.untyped_storage().data_ptr() for parameter in dit.parameters()}
        streams = 3 * 5 * 4 * 6 * CONFIG.hidden_size_x * 4
        kept[policy] = sum(size for where, size in storages.items() if where not in weights) / streams
    # In units of one stream: the inputs of the blocks and of the layers around them, and the outputs of attention.
    assert kept["block"] < 3.5 and kept["attention"] < kept["block"] + 1.6, kept


def test_compiled_blocks_recompute_with_the_same_dropout():
    # An adapter on one layer only, because compiling takes seconds per kernel.
    kept, *others = (build(dropout=0.3, layers=".attn.qkv_x", depth=1) for _ in POLICIES)
    for dit, policy in zip((kept, *others), POLICIES, strict=True):
        apply_activation_checkpointing(dit, [policy])
        apply_compilation(dit, print)
    expected, without = step(kept), step(build(layers=".attn.qkv_x", depth=1))
    assert relative_error(expected[0], without[0]) > 0.01, "dropout is on"
    for dit in others:
        for ours, theirs in zip(step(dit), expected, strict=True):
            assert relative_error(ours, theirs) <= GRADIENT_TOLERANCE


def test_a_compiled_dora_equals_an_uncompiled_one():
    shapes = {name: shape for name, shape in linear_shapes(AsymmDiT(CONFIG)).items() if ".attn." in name}
    generator = torch.Generator().manual_seed(3)
    layers = {
        name: LoraLayer(
            torch.randn(2, num_in, generator=generator) / 8,
            torch.randn(num_out, 2, generator=generator) / 8,
            2.0,
            0.5 + torch.rand(num_out, generator=generator),
        )
        for name, (num_out, num_in) in shapes.items()
    }
    outputs = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        dit = AsymmDiT(CONFIG).eval()
        apply_adapter(dit, layers, "dora")
        if is_compiled:
            apply_compilation(dit, pytest.fail, backend="aot_eager_decomp_partition")
        arguments = torch.randn(1, 12, 2, 4, 6), torch.tensor([0.3]), torch.randn(1, 5, 16), torch.ones(1, 5)
        outputs.append(dit(*arguments))
        switch_adapters(dit, on=False)
        outputs.append(dit(*arguments))
    plain, base, compiled, compiled_base = outputs
    assert relative_error(compiled, plain) <= TOLERANCE and relative_error(compiled_base, base) <= TOLERANCE
    assert relative_error(base, plain) > 0.01


def test_blocks_that_do_not_compile_run_as_they_are_and_one_line_says_why():
    for can_compile in ([False, False], [True, False], [False, True]):
        results = iter(can_compile)

        def broken(graph, _inputs, results=results):
            if next(results):
                return graph.forward
            raise RuntimeError("no compiler\nhere")

        dit, plain, lines = build(), build(), []
        # As for streamed blocks: blocks that were compiled before another one failed are recomputed as they ran.
        apply_compilation(dit, lines.append, backend=broken)
        apply_activation_checkpointing(dit, ["block"] * 3)
        for _ in range(2):
            for ours, theirs in zip(step(dit), step(plain), strict=True):
                assert torch.allclose(ours, theirs, atol=1e-5)
        [line] = lines
        assert line.startswith("blocks run uncompiled") and "no compiler here" in line and "\n" not in line
        assert not list(results)


def test_the_options_of_the_compiler_hold_in_every_thread():
    seen = []

    def note(graph, _inputs):
        # The cache of autograd's graphs would return code that runs another attention kernel than the chosen one.
        seen.append((torch._dynamo.config.recompile_limit, torch._functorch.config.enable_autograd_cache))
        return graph.forward

    dit = build(depth=1)
    apply_compilation(dit, pytest.fail, backend=note)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(step, dit).result()
    assert seen == [(MAX_GRAPHS, False)]
