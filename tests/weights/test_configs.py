import json

import pytest
from helpers_golden import GOLDEN
from helpers_weights import copy_golden, refused

from mochi_tune.errors import CheckpointError
from mochi_tune.models.dit import DiTConfig
from mochi_tune.models.vae import DecoderConfig, EncoderConfig
from mochi_tune.weights.configs import read_diffusers_config, read_official_config

TRANSFORMER = {
    "_class_name": "MochiTransformer3DModel",
    "patch_size": 2,
    "in_channels": 12,
    "num_layers": 2,
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "pooled_projection_dim": 96,
    "text_embed_dim": 64,
}


def test_the_official_configurations_give_the_reference_models_sizes():
    dit = DiTConfig(depth=2, num_heads=6, hidden_size_x=192, hidden_size_y=96, t5_feat_dim=64)
    assert read_official_config(GOLDEN / "dit_config.json", "dit") == dit
    sizes = {"base_channels": 32, "channel_multipliers": (1, 2, 1, 2), "num_res_blocks": (2, 1, 1, 2, 1)}
    assert read_official_config(GOLDEN / "vae_config.json", "encoder") == EncoderConfig(**sizes)
    assert read_official_config(GOLDEN / "vae_config.json", "decoder") == DecoderConfig(**sizes)


@pytest.mark.parametrize(
    ("part", "full_size"), [("dit", DiTConfig()), ("encoder", EncoderConfig()), ("decoder", DecoderConfig())]
)
def test_no_official_configuration_means_full_size(tmp_path, part, full_size):
    assert read_official_config(tmp_path / "config.json", part) == full_size


def test_a_ratio_may_be_an_integer(tmp_path):
    (tmp_path / "dit_config.json").write_text('{"mlp_ratio_x": 4}')
    ratio = read_official_config(tmp_path / "dit_config.json", "dit").mlp_ratio_x
    assert ratio == 4.0 and isinstance(ratio, float)


@pytest.mark.parametrize(
    ("part", "change", "expected"),
    [
        ("dit", {"dept": 2}, "unknown key dept"),
        ("dit", {"depth": "two"}, "depth='two' does not fit"),
        ("dit", {"depth": True}, "depth=True does not fit"),
        ("dit", {"qk_norm": False}, "qk_norm=False is not Mochi's"),
        ("encoder", {"num_res_blocks": [2, 1.5]}, "num_res_blocks=[2, 1.5] does not fit"),
        ("encoder", {"prune_bottlenecks": [False, True]}, "prune_bottlenecks=[False, True] is not Mochi's"),
        ("decoder", {"causal": False}, "causal=False is not Mochi's"),
    ],
)
def test_a_configuration_that_is_not_mochis_is_refused(tmp_path, part, change, expected):
    copy_golden(tmp_path, part)
    path = tmp_path / ("dit_config.json" if part == "dit" else "vae_config.json")
    values = json.loads(path.read_text())
    (values if part == "dit" else values[part]).update(change)
    path.write_text(json.dumps(values))
    assert f"{path}: {expected}" in refused(tmp_path, part)


def test_a_broken_official_configuration_is_named(tmp_path):
    copy_golden(tmp_path, "encoder")
    (tmp_path / "vae_config.json").write_text("{")
    assert "vae_config.json cannot be read as JSON" in refused(tmp_path, "encoder")
    (tmp_path / "vae_config.json").write_text("[]")
    assert "vae_config.json holds no JSON object" in refused(tmp_path, "encoder")
    (tmp_path / "vae_config.json").write_text("{}")
    assert 'has no "encoder" object' in refused(tmp_path, "encoder")


def test_a_diffusers_configuration_of_another_model_is_refused(tmp_path):
    path = tmp_path / "config.json"

    def message(values):
        path.write_text(json.dumps(values))
        with pytest.raises(CheckpointError) as caught:
            read_diffusers_config(path, "dit")
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    other = "CogVideoXTransformer3DModel"
    assert f"describes a {other}, not Mochi's" in message(TRANSFORMER | {"_class_name": other})
    assert "has no 'num_layers'" in message({k: v for k, v in TRANSFORMER.items() if k != "num_layers"})
    assert "is not that of a MochiTransformer3DModel" in message(TRANSFORMER | {"num_attention_heads": None})
    path.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_diffusers_config(path, "dit")


def test_a_diffusers_configuration_gives_the_same_sizes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TRANSFORMER))
    assert read_diffusers_config(tmp_path / "config.json", "dit") == read_official_config(
        GOLDEN / "dit_config.json", "dit"
    )


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("decoder", {"temporal_expansions": [1, 2]}),
        ("decoder", {"channel_multipliers": [1]}),
        ("encoder", {"has_attentions": [True]}),
        ("dit", {"num_heads": 0}),
        ("dit", {"depth": -1}),
        ("dit", {"depth": 10_000_000}),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused_in_one_line(tmp_path, part, change):
    copy_golden(tmp_path, part)
    path = tmp_path / ("dit_config.json" if part == "dit" else "vae_config.json")
    values = json.loads(path.read_text())
    (values if part == "dit" else values[part]).update(change)
    path.write_text(json.dumps(values))
    assert f"{path}: " in refused(tmp_path, part)
