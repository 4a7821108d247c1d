import torch

from mochi_tune.models.attention import apply_rope, rope_tables

# The longest clip's grid: 163 frames of 480 x 848.
GRID = (28, 30, 53)
FREQUENCIES = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))


def exact_angles() -> torch.Tensor:
    """Returns the angles of all tokens, (N, H, K/2), in fp64."""
    frames, rows, columns = GRID
    scale = (192 * 192 / (rows * columns)) ** 0.5
    axes = [torch.arange(frames, dtype=torch.float64)]
    axes += [(torch.arange(n, dtype=torch.float64) + 0.5 - n / 2) * scale for n in (rows, columns)]
    t, row, column = (axis[..., None, None] for axis in torch.meshgrid(*axes, indexing="ij"))
    along = FREQUENCIES.double()
    return (t * along[0] + row * along[1] + column * along[2]).flatten(0, 2)


def test_angles_keep_fp32_over_the_longest_clip():
    cos, sin = rope_tables(FREQUENCIES, GRID)
    angles = exact_angles()
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == angles.shape
    assert (cos - angles.cos()).abs().max() <= 1e-4 and (sin - angles.sin()).abs().max() <= 1e-4


def test_tables_are_fp32_under_autocast_too():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, sin = rope_tables(FREQUENCIES, GRID)
    expected = rope_tables(FREQUENCIES, GRID)
    assert torch.equal(cos, expected[0]) and torch.equal(sin, expected[1])


def test_rotation_is_fp32_whatever_is_rotated():
    cos, sin = (table[::97] for table in rope_tables(FREQUENCIES, GRID))
    x = torch.randn(1, cos.shape[0], 2, 8, generator=torch.Generator().manual_seed(1))
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs * torch.polar(torch.ones_like(pairs.real), exact_angles()[::97])).flatten(-2)
    assert (apply_rope(x, cos, sin) - rotated).abs().max() <= 1e-3

    half = x.bfloat16()
    got = apply_rope(half, cos, sin)
    # One rounding at the end, and none before it.
    assert got.dtype == torch.bfloat16 and torch.equal(got, apply_rope(half.float(), cos, sin).bfloat16())
