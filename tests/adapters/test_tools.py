import io
import json
import math
import re
import weakref

import pytest
import torch
from helpers_adapters import ALL, ATTENTION, MIXED, MLPS, delta64, random_adapter, with_magnitudes

from mochi_tune.adapters import notes
from mochi_tune.adapters.files import Adapter, LoraLayer, load_adapter, save_adapter
from mochi_tune.adapters.low_rank import Limit
from mochi_tune.adapters.tools import (
    block_and_kind,
    compare_adapters,
    measure_layers,
    merge_adapters,
    resize_adapter,
)
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.files import file_sha256
from mochi_tune.recipes.export import rounding_error


def based(adapter, fingerprint="abc", **metadata):
    adapter.metadata |= {"base_fingerprint": fingerprint, **metadata}
    return adapter


def total_norm(changes):
    return math.sqrt(sum(float(change.square().sum()) for change in changes))


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_each_layer_is_measured():
    adapter = random_adapter(ALL, MIXED)
    facts = measure_layers(adapter)
    assert facts.keys() == adapter.layers.keys()
    for name, layer in adapter.layers.items():
        values = torch.linalg.svdvals(delta64(layer))
        held = values.square().cumsum(0) / values.square().sum()
        assert facts[name].norm == pytest.approx(float(values.norm()), rel=1e-12)
        assert (facts[name].rank, facts[name].alpha) == (layer.rank, layer.alpha)
        for share, rank in ((0.9, facts[name].rank_90), (0.99, facts[name].rank_99)):
            assert held[rank - 1] >= share and (rank == 1 or held[rank - 2] < share)


def test_layers_come_in_the_order_of_the_blocks():
    one = LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    names = ["blocks.0.attn.proj_x", "blocks.2.attn.proj_x", "blocks.10.attn.proj_x", "t5_y_embedder.to_q"]
    assert list(measure_layers(Adapter(dict.fromkeys(sorted(names), one)))) == names
    assert block_and_kind(names[2]) == (10, "attn.proj_x") and block_and_kind(names[3]) == (None, "t5_y_embedder.to_q")


def test_a_merge_is_the_sum_of_the_changes():
    """One has layers that the other lacks."""
    one, other = based(random_adapter(ATTENTION, MIXED)), random_adapter(ALL, seed=1)
    merged, errors = merge_adapters([one, other], [0.8, -0.5])
    assert errors is None and merged.layers.keys() == other.layers.keys()
    for name, layer in merged.layers.items():
        expected = -0.5 * delta64(other.layers[name])
        if name in one.layers:
            expected += 0.8 * delta64(one.layers[name])
        torch.testing.assert_close(delta64(layer), expected, rtol=0, atol=2e-7 * float(expected.abs().max()))


def test_a_merge_leaves_its_inputs_as_they_are():
    """One adapter may be given twice, and a merge that fails takes nothing away."""
    one, narrow = random_adapter(), random_adapter()
    names = list(one.layers)
    merged, _ = merge_adapters([one, one], [1.0, 0.5])
    for name, layer in merged.layers.items():
        torch.testing.assert_close(delta64(layer), 1.5 * delta64(one.layers[name]), rtol=0, atol=1e-6)
    last = narrow.layers[names[-1]]
    narrow.layers[names[-1]] = LoraLayer(last.a[:, :9], last.b, last.alpha)
    with pytest.raises(CheckpointError, match="has another size"):
        merge_adapters([one, narrow], [1.0, 1.0])
    assert list(one.layers) == names and list(narrow.layers) == names


@pytest.mark.parametrize("limit", [None, Limit(rank=2)])
def test_a_merge_holds_no_layer_that_is_already_merged(limit):
    adapters = [random_adapter(ATTENTION, MIXED), random_adapter(ALL, seed=1)]
    alive = [weakref.ref(layer.a) for each in adapters for layer in each.layers.values()]
    num_alive = []

    def count(names, *_, **__):
        for name in names:
            num_alive.append(sum(reference() is not None for reference in alive))
            yield name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notes, "tqdm", count)
        merged, _ = merge_adapters(adapters, [0.8, -0.5], limit, release_layers=True)
    assert len(merged.layers) == len(random_adapter(ALL).layers) and not any(each.layers for each in adapters)
    # The layer that was merged last may be alive until the next one replaces it.
    assert num_alive[0] == len(alive) and num_alive[-1] <= 2 + 2


def test_a_terminal_shows_how_many_layers_are_done(tmp_path, monkeypatch, capsys):
    one, other = random_adapter(), random_adapter(seed=1)
    save_adapter(tmp_path / "one.safetensors", one)

    monkeypatch.setattr(notes, "BAR_DELAY", 0)

    def do_all():
        load_adapter(tmp_path / "one.safetensors")
        measure_layers(one)
        rounding_error(one.layers, torch.bfloat16)
        merge_adapters([one, other], [1.0, 1.0])
        compare_adapters(one, other)
        resize_adapter(one, Limit(rank=2))

    do_all()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    do_all()
    for verb in ("read", "measure", "rounding error", "merge", "compare", "resize"):
        assert re.search(rf"{verb}: .*0/{len(one.layers)} ", terminal.getvalue())


def test_a_merge_states_its_sources_and_keeps_the_base(tmp_path):
    one, other = based(random_adapter(), step="7", rslora="true", base_model="m"), random_adapter(seed=1)
    other.metadata |= {"step": "9", "base_model": "m"}
    paths = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for path, adapter in zip(paths, (one, other), strict=True):
        save_adapter(path, adapter)
    adapters, sums = [load_adapter(path) for path in paths], [file_sha256(path) for path in paths]
    # Another program replaces a file after it was read.
    save_adapter(paths[0], random_adapter(seed=2))
    merged, _ = merge_adapters(adapters, [1.0, 0.5])
    assert json.loads(merged.metadata.pop("sources")) == [
        {"step": step, "file": path.name, "sha256": sha256, "strength": strength}
        for step, path, sha256, strength in zip("79", paths, sums, (1.0, 0.5), strict=True)
    ]
    del merged.metadata["created_by"], merged.metadata["modelspec.title"]
    assert merged.metadata == {"base_fingerprint": "abc", "num_blocks": "2", "base_model": "m", "tool": "lora merge"}


def test_a_reduced_merge_reports_its_errors():
    adapters = [random_adapter(sizes=((4, 4.0),), seed=seed) for seed in (0, 1)]
    exact, _ = merge_adapters(adapters, [1.0, 1.0])
    merged, errors = merge_adapters(adapters, [1.0, 1.0], Limit(rank=5))
    assert {layer.rank for layer in merged.layers.values()} == {5} and errors is not None
    gaps = {name: delta64(layer) - delta64(exact.layers[name]) for name, layer in merged.layers.items()}
    for name, gap in gaps.items():
        change = delta64(exact.layers[name])
        tail = torch.linalg.svdvals(change)[5:].norm()
        assert errors.layers[name] == pytest.approx(float(tail / change.norm()), rel=1e-6)
        assert errors.layers[name] == pytest.approx(float(gap.norm() / change.norm()), rel=1e-6)
    whole = total_norm(delta64(layer) for layer in exact.layers.values())
    assert errors.total == pytest.approx(total_norm(gaps.values()) / whole, rel=1e-6)
    assert errors.layers[errors.worst] == max(errors.layers.values())
    assert float(merged.metadata["relative_error"]) == pytest.approx(errors.total, rel=1e-2)


def test_adapters_that_cannot_be_merged_are_refused():
    one, other = based(random_adapter()), based(random_adapter(seed=1), "xyz")
    with pytest.raises(CheckpointError, match=r"different bases, by their base_fingerprint: .* abc; .* xyz"):
        merge_adapters([one, other], [1.0, 1.0])
    other.metadata |= {"base_fingerprint": "abc", "num_blocks": "48"}
    with pytest.raises(CheckpointError, match="different bases, by their num_blocks"):
        merge_adapters([one, other], [1.0, 1.0])
    with pytest.raises(CheckpointError, match="is a DoRA and cannot be merged"):
        merge_adapters([one, with_magnitudes(random_adapter())], [1.0, 1.0])
    narrow = random_adapter()
    layer = narrow.layers["blocks.0.attn.qkv_x"]
    narrow.layers["blocks.0.attn.qkv_x"] = LoraLayer(layer.a[:, :9], layer.b, layer.alpha)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv_x has another size"):
        merge_adapters([one, narrow], [1.0, 1.0])
    for strengths in ([1.0], [1.0, 0.0], [1.0, math.inf]):
        with pytest.raises(ConfigError, match="strengths"):
            merge_adapters([one, one], strengths)


def test_a_strength_that_fp32_cannot_hold_is_named():
    with pytest.raises(ConfigError, match=r"strengths: 1e\+300 is too large for blocks\.0\.attn\.proj_x, in fp32"):
        merge_adapters([random_adapter(), random_adapter(seed=1)], [1e300, 1.0])


@pytest.mark.parametrize("limit", [None, Limit(rank=2)])
def test_a_sum_that_cancels_out_is_refused(limit):
    one, two, rest = random_adapter(), random_adapter(), random_adapter(("attn.qkv_x",), seed=1)
    for layer in two.layers.values():
        # The same change with another split of the scale, so that only rounding is left.
        layer.b, layer.alpha = layer.b * 3, layer.alpha / 3
    with pytest.raises(ConfigError, match=r"strengths=\[1.0, -1.0\]: .* cancel out, so that nothing is left"):
        merge_adapters([one, two], [1.0, -1.0], limit)
    merged, errors = merge_adapters([one, two, rest], [1.0, -1.0, 1.0], limit)
    assert merged.layers.keys() == rest.layers.keys()
    assert errors is None or errors.total < 1


@pytest.mark.parametrize("limit", [Limit(rank=4), Limit(energy=0.9)], ids=["rank", "energy"])
def test_a_resize_reports_the_tail_of_each_layer(limit):
    adapter = based(random_adapter(ALL, MIXED), step="7", tool="lora merge")
    resized, errors = resize_adapter(adapter, limit)
    for name, layer in adapter.layers.items():
        values = torch.linalg.svdvals(delta64(layer))
        rank = resized.layers[name].rank
        assert errors.layers[name] == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-12)
        assert rank <= 4 if limit.rank else errors.layers[name] ** 2 <= 0.1 + 1e-12
    assert resized.metadata["base_fingerprint"] == "abc" and resized.metadata["step"] == "7"
    assert resized.metadata["tool"] == "lora resize" and "rank" not in resized.metadata


def test_a_resize_that_would_change_nothing_or_a_dora_is_refused():
    with pytest.raises(ConfigError, match="rank=16 is not below that of any layer of the adapter, which has 16"):
        resize_adapter(random_adapter(), Limit(rank=16))
    with pytest.raises(CheckpointError, match="is a DoRA and cannot be resized"):
        resize_adapter(with_magnitudes(random_adapter()), Limit(rank=2))


@pytest.mark.parametrize("to", ["official", "diffusers", "comfyui", "native"])
def test_a_conversion_is_the_same_change(tmp_path, to):
    adapter = random_adapter(ATTENTION, MIXED)
    save_adapter(tmp_path / "a.safetensors", adapter, to)
    assert compare_adapters(adapter, load_adapter(tmp_path / "a.safetensors")).is_same


def test_a_comparison_is_that_of_the_changes():
    one, other = random_adapter(ALL, MIXED), random_adapter(ATTENTION, seed=1)
    del one.layers["blocks.0.attn.proj_y"]
    found = compare_adapters(one, other)
    assert found.only_second == ["blocks.0.attn.proj_y"] and not found.is_same
    assert found.only_first == [name for name in one.layers if name.endswith(MLPS)]
    gap = product = 0.0
    for name in found.differences:
        x, y = delta64(one.layers[name]), delta64(other.layers[name])
        assert found.differences[name] == pytest.approx(float((x - y).norm() / max(x.norm(), y.norm())), rel=1e-10)
        assert found.cosines[name] == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-12)
        gap, product = gap + float((x - y).square().sum()), product + float((x * y).sum())
    norms = [total_norm(map(delta64, each.layers.values())) for each in (one, other)]
    for each, names in ((one, found.only_first), (other, found.only_second)):
        gap += sum(float(delta64(each.layers[name]).square().sum()) for name in names)
    assert found.difference == pytest.approx(math.sqrt(gap) / max(norms), rel=1e-10)
    assert found.cosine == pytest.approx(product / norms[0] / norms[1], abs=1e-12)


def test_one_layer_that_differs_is_found():
    one, other = random_adapter(), random_adapter()
    assert compare_adapters(one, other).is_same
    other.layers["blocks.0.attn.proj_y"].b[0, 0] *= 1.01
    found = compare_adapters(one, other)
    assert not found.is_same and found.difference < 1e-3


def test_doras_are_compared_with_their_magnitudes():
    one, other = with_magnitudes(random_adapter()), with_magnitudes(random_adapter())
    assert compare_adapters(one, other).is_same
    magnitude = other.layers["blocks.0.attn.qkv_x"].magnitude
    assert magnitude is not None
    magnitude[0] *= 1.1
    found = compare_adapters(one, other)
    assert not found.is_same and found.difference == max(found.differences.values()) > 1e-3
    with pytest.raises(CheckpointError, match="is a DoRA and the other adapter is not"):
        compare_adapters(one, random_adapter())


def test_adapters_of_one_base_in_two_dtypes_merge():
    """The fingerprint of a base depends on the dtype of its file, so the two cannot be compared."""
    one, other = based(random_adapter()), based(random_adapter(seed=1), "F8_E4M3:xyz")
    assert merge_adapters([one, other], [1.0, 1.0])
    with pytest.raises(CheckpointError, match="different bases"):
        merge_adapters([one, other, based(random_adapter(seed=2), "F8_E4M3:uvw")], [1.0, 1.0, 1.0])
