"""Functions that save memory do not change the results."""

import pytest
import torch
import torch._inductor.config
from helpers_golden import GOLDEN, vectors
from helpers_memory import TensorMemory
from helpers_parallel import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from mochi_tune.adapters.files import load_adapter
from mochi_tune.adapters.lora import apply_adapter
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.parallel.memory import apply_block_offload, apply_quantization, apply_sharding
from mochi_tune.parallel.modulation import apply_host_modulation
from mochi_tune.parallel.stream import ThreadCopier
from mochi_tune.sampling.sampler import Denoiser, euler_steps, linear_quadratic_sigmas
from mochi_tune.weights.folder import WeightsFolder

IO = vectors("dit_io")
PROMPT, NEGATIVE = (IO["y_feat"], IO["y_mask"]), (IO["null_feat"], torch.zeros_like(IO["y_mask"]))
GUIDANCE = IO["cfg_schedule"].tolist()
SIGMAS = linear_quadratic_sigmas(len(GUIDANCE), 0.025)


def rendered(dit) -> torch.Tensor:
    *_, latents = euler_steps(Denoiser(dit, PROMPT, NEGATIVE), IO["z"], SIGMAS, GUIDANCE)
    return latents


def adapt(dit) -> None:
    apply_adapter(dit, load_adapter(GOLDEN / "lora.safetensors").layers, "adapter")


@pytest.fixture(scope="module")
def adapted() -> torch.Tensor:
    dit = WeightsFolder(GOLDEN).load_dit("cpu", torch.float32)
    adapt(dit)
    return rendered(dit)


def test_offloaded_blocks_render_the_same(adapted):
    dit = WeightsFolder(GOLDEN).load_dit("cpu", torch.float32)
    adapt(dit)
    apply_block_offload(dit, torch.device("cpu"))
    assert torch.equal(rendered(dit), adapted)


class Recorder(ThreadCopier):
    """Writes down which block is copied, by the address of its first weight in host memory."""

    def __init__(self, addresses, log) -> None:
        super().__init__()
        self.addresses, self.log = addresses, log

    def start(self, targets, sources):
        self.log.append(("copy", self.addresses.index(sources[0].data_ptr())))
        return super().start(targets, sources)


@torch.no_grad()
def test_two_offloaded_blocks_are_on_the_device_and_the_next_one_is_copied_while_a_block_computes():
    torch.manual_seed(0)
    dit = AsymmDiT(DiTConfig(depth=6, num_heads=6, hidden_size_x=192, hidden_size_y=96, t5_feat_dim=32)).eval()
    arguments = torch.randn(1, 12, 1, 2, 2), torch.tensor([0.5]), torch.randn(1, 3, 32), torch.ones(1, 3)
    first = [next(block.parameters()) for block in dit.blocks]
    home, log, away = [p.data_ptr() for p in first], [], []
    apply_block_offload(dit, torch.device("cpu"), Recorder(home, log))
    for number, block in enumerate(dit.blocks):
        block.mlp_x.register_forward_hook(lambda *_, number=number: log.append(("run", number)))
        block.mlp_x.register_forward_hook(
            lambda *_: away.append({i: p.data_ptr() for i, p in enumerate(first) if p.data_ptr() != home[i]})
        )
    for _ in range(2):
        dit(*arguments)
    assert all(number % 6 in there and len(there) <= 2 for number, there in enumerate(away))
    assert len({address for there in away for address in there.values()}) == 2, "the same buffers in every pass"
    # A copy waits for the work before it: that of block 2 for block 0, whose buffer it takes, not for block 1.
    middle = [entry for i in range(5) for entry in (("copy", i + 1), ("run", i))]
    assert log == 2 * [("copy", 0), *middle, ("run", 5)]


@torch.no_grad()
def shares_of_a_pass() -> list[torch.Tensor]:
    mesh = init_device_mesh("cpu", (2,))

    def share(_dit, block) -> None:
        apply_host_modulation(block)
        apply_sharding(block, mesh)

    dit = WeightsFolder(GOLDEN).load_dit("cpu", torch.float32, share)

    def held() -> int:
        return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in dit.blocks.parameters())

    before = held()
    dit(IO["z"], IO["sigma"], IO["y_feat"], IO["y_mask"])
    return [torch.tensor([before, held(), sum(p.numel() for p in dit.blocks.parameters())])]


def test_blocks_that_are_in_shares_are_so_again_after_a_pass(tmp_path):
    for [counted] in run_ranks(2, shares_of_a_pass, tmp_path):
        before, after, complete = counted.tolist()
        assert before == after <= 0.51 * complete


@pytest.mark.parametrize(("precision", "tolerance"), [("int8", 0.02), ("fp8", 0.08)])
def test_eight_bit_bases_are_accurate_and_take_adapters(precision, tolerance, adapted):
    compiler = torch._inductor.config.get_config_copy()
    dit = WeightsFolder(GOLDEN).load_dit("cpu", torch.bfloat16, lambda _, block: apply_quantization(block, precision))
    # torchao's settings would tune every kernel for minutes, here and in all later compilations.
    assert torch._inductor.config.get_config_copy() == compiler
    half = WeightsFolder(GOLDEN).load_dit("cpu", torch.bfloat16)
    for model in (dit, half):
        adapt(model)
    expected = rendered(half)
    error = ((rendered(dit) - expected).norm() / expected.norm()).item()
    assert 1e-4 < error < tolerance
    weight = dit.blocks[0].mlp_x.w1.weight
    assert sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0]) < 1.1 * weight.numel()


class NoScores(torch.nn.Module):
    """Attention with the memory of a fused kernel: contiguous inputs and an output."""

    def forward(self, q_x, k_x, v_x, q_y, k_y, v_y, text_lengths):
        q, _k, _v = (torch.cat(pair, dim=1) for pair in ((q_x, q_y), (k_x, k_y), (v_x, v_y)))
        out = torch.empty_like(q).flatten(2)
        return out[:, : q_x.shape[1]], out[:, q_x.shape[1] :]


@torch.no_grad()
def test_a_pass_over_163_frames_of_480p_takes_less_than_five_gib_besides_the_weights():
    """Counted at full size, for the sums in docs/sampling.md."""
    num_tokens = 28 * 30 * 53
    with torch.device("meta"):
        block = AsymmDiT(DiTConfig(depth=2)).to(torch.bfloat16).blocks[0]
        block.attn.core = NoScores()
        x, y, c = (torch.empty(1, n, d, dtype=torch.bfloat16) for n, d in ((num_tokens, 3072), (256, 1536), (1, 3072)))
        rope = torch.empty(2, num_tokens, 24, 64)
        with TensorMemory() as memory:
            block(x, y, (block.mod_x(c[:, 0]), block.mod_y(c[:, 0])), tuple(rope), None)
    held = sum(t.nbytes for t in (x, y, rope))
    assert 4.0 < (memory.peak + held) / 2**30 < 5.0
    kept = [p for name, p in block.named_parameters() if "mod_" not in name]
    assert 13.4 < 48 * sum(p.nbytes for p in kept) / 2**30 < 13.6
