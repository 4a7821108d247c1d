import torch
import torch.nn.functional as F

from mochi_tune.models.layers import FinalLayer, RMSNorm, TimestepEmbedder, gated_residual, modulated_rms_norm


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_the_final_norm_is_computed_in_fp32_and_rounded_once():
    torch.manual_seed(0)
    layer = FinalLayer(64, patch_size=2, out_channels=12).bfloat16()
    seen = []
    layer.linear.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    x, c = random(2, 12, 64).bfloat16(), random(2, 64, seed=1).bfloat16()
    layer(x, c, (3, 2, 2))
    shift, scale = layer.mod(c).float().unsqueeze(1).chunk(2, dim=-1)
    exact = F.layer_norm(x.float(), (64,), eps=1e-6) * (1 + scale) + shift
    assert seen[0].dtype == torch.bfloat16 and torch.equal(seen[0], exact.bfloat16())


def test_small_values_show_the_official_eps():
    """At 1e-3 the mean square is as large as the eps of the unweighted norms, so any other eps fails."""
    x, gate = 1e-3 * random(2, 5, 64), random(2, 64, seed=1)
    exact, wide = x.double(), gate.double().unsqueeze(1)
    mean_square = exact.square().mean(-1, keepdim=True)
    for got, expected in (
        (modulated_rms_norm(x, gate), exact / (mean_square + 1e-6).sqrt() * (1 + wide)),
        (gated_residual(torch.ones_like(x), x, gate), 1 + exact / (mean_square + 1e-6).sqrt() * wide.tanh()),
        (RMSNorm(64)(x), exact / (mean_square + 1e-5).sqrt()),
    ):
        assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_sigma_becomes_cosines_then_sines_of_a_thousand_times_what_is_clean():
    sigma = torch.tensor([0.0, 0.0625, 0.4, 0.999, 1.0])
    steps = ((1 - sigma) * 1000).double()
    angles = steps[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    # In bf16 the sinusoid is rounded to 8 bits, but its angles are not.
    for dtype, tolerance in ((torch.float32, 2e-4), (torch.bfloat16, 2.2e-3)):
        embedder = TimestepEmbedder(32, scale=1000.0, bias=True).to(dtype)
        seen = []
        embedder.mlp.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0]))
        assert embedder(sigma).dtype == dtype
        assert (seen[0].double() - expected).abs().max() <= tolerance
