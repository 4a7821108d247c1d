import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.flops import dit_flops


def test_the_blocks_arithmetic_is_what_torch_counts():
    config = DiTConfig(depth=3, num_heads=4, hidden_size_x=128, hidden_size_y=64, t5_feat_dim=32)
    dit = AsymmDiT(config)
    x, y, c = torch.randn(1, 24, 128), torch.randn(1, 7, 64), torch.randn(1, 128)
    rope = dit.rope(dit.pos_frequencies, (2, 3, 4))
    modulation = dit.modulation_of(c).blocks
    # torch does not count the FLOPs of the CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for block, mods in zip(dit.blocks, modulation, strict=True):
            x, y = block(x, y, mods, rope, None)
    counted = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for operation, flops in counted.items() if "attention" in operation or "bmm" in operation)
    assert dit_flops(config, 24, 7) == (sum(counted.values()) - attention, attention)


def test_mochi_at_163_frames_has_the_flops_of_its_official_sizes():
    # 28 latent frames of 30 x 53 tokens, 256 text tokens: 485 and 1183 TFLOP in 48 full blocks.
    matrix, attention = dit_flops(DiTConfig(), 28 * 1590, 256)
    assert abs(matrix / 1e12 - 485) < 2 and abs(attention / 1e12 - 1183) < 2
