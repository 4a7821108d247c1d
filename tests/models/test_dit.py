import json
from collections import Counter

import pytest
import torch
from helpers_golden import GOLDEN, golden_dit, relative_error, vectors
from torch.utils._python_dispatch import TorchDispatchMode

from mochi_tune.models.dit import AsymmDiT, DiTConfig, pack_prompts
from mochi_tune.models.layers import RMSNorm, gated_residual, modulated_rms_norm
from mochi_tune.parallel.recompute import apply_activation_checkpointing

IO = vectors("dit_io")


@pytest.fixture(scope="module")
def dit():
    return golden_dit()


@torch.no_grad()
def test_full_size_has_the_official_names_shapes_and_count():
    with torch.device("meta"):
        dit = AsymmDiT(DiTConfig())
    expected = json.loads((GOLDEN / "full_size_keys.json").read_text())["dit"]
    assert {name: list(tensor.shape) for name, tensor in dit.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in dit.parameters()) == 10_027_677_744


@torch.no_grad()
@pytest.mark.parametrize(
    ("output", "latents", "sigma", "embeds", "mask"),
    [
        ("out_cond", "z", "sigma", "y_feat", "y_mask"),
        ("batch_out", "batch_z", "batch_sigma", "batch_y_feat", "batch_y_mask"),
        ("long_out", "long_z", "sigma", "y_feat", "y_mask"),
    ],
)
def test_forward_is_the_official_one(dit, output, latents, sigma, embeds, mask):
    assert relative_error(dit(IO[latents], IO[sigma], IO[embeds], IO[mask]), IO[output]) <= 2e-5


@torch.no_grad()
def test_empty_prompt_is_the_official_one(dit):
    got = dit(IO["z"], IO["sigma"], IO["null_feat"], torch.zeros_like(IO["y_mask"]))
    assert relative_error(got, IO["out_null"]) <= 2e-5


@torch.no_grad()
def test_bf16_is_the_official_one():
    dit = golden_dit(torch.bfloat16)
    got = dit(IO["z"], IO["sigma"], IO["y_feat"], IO["y_mask"])
    assert got.dtype == torch.bfloat16
    assert relative_error(got, IO["out_cond_bf16"]) <= 2e-2


@torch.no_grad()
def test_a_row_is_the_same_alone_or_in_a_batch_and_at_any_padding(dit):
    latents, sigma = IO["batch_z"], IO["batch_sigma"]
    embeds, mask = IO["batch_y_feat"], IO["batch_y_mask"].bool()
    lengths = mask.sum(1).tolist()
    assert len(set(lengths)) == 2, "the two prompts differ in length"
    together = dit(latents, sigma, embeds, mask)
    for row, length in enumerate(lengths):
        for padded in (length, length + 3, 64):
            text = torch.zeros(1, padded, embeds.shape[2])
            text[:, :length] = embeds[row, :length]
            valid = torch.arange(padded)[None] < length
            alone = dit(latents[row : row + 1], sigma[row : row + 1], text, valid)
            assert relative_error(alone, together[row : row + 1]) <= 2e-5


@torch.no_grad()
def test_an_empty_prompt_beside_a_long_one_is_the_empty_prompt_alone(dit):
    latents = IO["z"].repeat(2, 1, 1, 1, 1)
    embeds = torch.cat([IO["y_feat"], IO["null_feat"]])
    mask = torch.cat([IO["y_mask"], torch.zeros_like(IO["y_mask"])])
    for order in ([0, 1], [1, 0]):
        got = dit(latents, IO["sigma"].repeat(2), embeds[order], mask[order])
        assert relative_error(got[order.index(0)], IO["out_cond"][0]) <= 2e-5
        assert relative_error(got[order.index(1)], IO["out_null"][0]) <= 2e-5


@torch.no_grad()
def test_the_values_of_the_padding_do_not_matter(dit):
    embeds = IO["y_feat"].clone()
    embeds[~IO["y_mask"].bool()] = 1e4
    assert torch.equal(
        dit(IO["z"], IO["sigma"], embeds, IO["y_mask"]), dit(IO["z"], IO["sigma"], IO["y_feat"], IO["y_mask"])
    )


def test_pack_prompts_moves_valid_tokens_to_the_front():
    embeds = torch.arange(8.0).view(2, 4, 1)
    packed, mask, lengths = pack_prompts(embeds, torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]]))
    assert lengths == [2, 1]
    assert packed[0].flatten().tolist() == [1, 3] and packed[1, 0].item() == 4
    assert mask.tolist() == [[True, True], [True, False]]


@torch.no_grad()
def test_bf16_keeps_norms_and_rope_in_fp32(dit):
    """Over 28 latent frames, the error of bf16 matrices is only small if norms and RoPE are computed in fp32."""
    half = golden_dit(torch.bfloat16)
    assert half.pos_frequencies.dtype == torch.float32
    assert all(m.weight.dtype == torch.float32 for m in half.modules() if isinstance(m, RMSNorm))
    assert half.blocks[0].attn.qkv_x.weight.dtype == torch.bfloat16
    got = half(IO["long_z"], IO["sigma"], IO["y_feat"], IO["y_mask"])
    assert relative_error(got, IO["long_out"]) <= 1e-2


def test_norms_are_computed_in_fp32():
    torch.manual_seed(0)
    x, scale = torch.randn(1, 5, 64).bfloat16(), torch.randn(1, 64).bfloat16()
    for got, exact in (
        (modulated_rms_norm(x, scale), modulated_rms_norm(x.double().float(), scale.float())),
        (
            gated_residual(torch.zeros_like(x), x, scale),
            gated_residual(torch.zeros(1, 5, 64), x.float(), scale.float()),
        ),
        (RMSNorm(64)(x), RMSNorm(64)(x.float())),
    ):
        assert got.dtype == torch.bfloat16
        # One rounding at the end, and none before it.
        assert torch.equal(got, exact.bfloat16())


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointed in (False, True):
        dit = golden_dit()
        dit.requires_grad_(True)
        if checkpointed:
            apply_activation_checkpointing(dit, ["block"] * len(dit.blocks))
        dit(IO["z"], IO["sigma"], IO["y_feat"], IO["y_mask"]).square().mean().backward()
        gradients.append({name: p.grad for name, p in dit.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 40
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_the_last_block_gives_its_text_queries_no_gradient():
    dit = golden_dit()
    weight = dit.blocks[-1].attn.qkv_y.weight.requires_grad_(True)
    dit(IO["z"], IO["sigma"], IO["y_feat"], IO["y_mask"]).square().mean().backward()
    q, k, v = weight.grad.chunk(3)
    assert not q.any() and k.any() and v.any()


def test_the_noise_level_and_the_mask_may_be_on_the_cpu():
    """Training keeps both on the CPU while the model is on a GPU."""
    with torch.device("meta"):
        dit = AsymmDiT(DiTConfig(depth=1, num_heads=2, hidden_size_x=64, hidden_size_y=32, t5_feat_dim=16))
        prompt = torch.empty(1, 3, 16)
    assert dit.condition(torch.tensor([0.5]), prompt, torch.ones(1, 3)).device == prompt.device


class Copies(TorchDispatchMode):
    """Counts the operations that only copy, cast or join tensors of at least `at_least` elements."""

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.at_least, self.counts = at_least, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("clone", "_to_copy", "copy_", "cat", "stack") and out.numel() >= self.at_least:
            self.counts[name] += 1
        return out


def block_and_inputs(dtype: torch.dtype) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """Returns a block with its matrices in a dtype, and its inputs: x, y, both modulations, cos and sin."""
    block = AsymmDiT(DiTConfig(depth=2, num_heads=2, hidden_size_x=64, hidden_size_y=32)).blocks[0]
    for module in block.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)
    streams = [torch.randn(*shape, dtype=dtype) for shape in ((1, 40, 64), (1, 3, 32), (1, 4 * 64), (1, 4 * 32))]
    return block, [*streams, *torch.randn(2, 40, 2, 16)]


@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_copies_visual_tokens_no_more_than_it_must(dtype, has_grad):
    block, (x, y, *mods, cos, sin) = block_and_inputs(dtype)
    with torch.set_grad_enabled(has_grad), Copies(x.numel() // 2) as copies:
        block(x, y, mods, (cos, sin), None)
    # Queries, keys and values are joined with those of the text.
    expected = {"cat": 3}
    if has_grad:
        # The rotated pairs of queries and of keys are each stacked.
        expected["stack"] = 2
    if dtype == torch.bfloat16:
        # Six norms and two rotations each convert to fp32 and back.
        expected["_to_copy"] = 16
    assert copies.counts == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_gives_the_same_bits_with_and_without_gradients_and_keeps_its_inputs(dtype):
    block, inputs = block_and_inputs(dtype)
    given = [tensor.clone() for tensor in inputs]
    x, y, *mods, cos, sin = inputs
    expected = block(x, y, mods, (cos, sin), None)
    with torch.no_grad():
        got = block(x, y, mods, (cos, sin), None)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, inputs, strict=True))
