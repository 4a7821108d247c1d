import pytest

from mochi_tune.config.load import load_config
from mochi_tune.errors import ConfigError

OTHERS = ("adamw_8bit", "adafactor", "prodigy", "muon", "schedule_free")
FITTING = {"prodigy": ("train.learning_rate=1",), "schedule_free": ("train.schedule=constant",)}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (("train.optimizer=prodigy",), "train.learning_rate=0.0002 does not fit train.optimizer=prodigy"),
        (
            ("train.optimizer=prodigy", "train.learning_rate=1", "train.learning_rate_b_ratio=16"),
            "train.learning_rate_b_ratio=16.0 does not fit",
        ),
        (("train.optimizer=schedule_free", "train.learning_rate=1e-3"), "use train.schedule=constant."),
        (("train.optimizer=muon", "lora.dora=true"), "lora.dora=true trains vectors: use adamw."),
    ],
)
def test_what_does_not_fit_an_optimizer_is_one_line(settings, text):
    with pytest.raises(ConfigError) as error:
        load_config("my_lora", list(settings))
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", OTHERS)
def test_zero_shards_adamw_only(name):
    settings = [f"train.optimizer={name}", *FITTING.get(name, ())]
    assert load_config("my_lora", settings).train.optimizer == name
    for strategy in ("zero2", "zero3"):
        assert load_config("my_lora", [f"parallel={strategy}"]).parallel.strategy == strategy
        with pytest.raises(ConfigError, match=r"use train.optimizer=adamw, or parallel.strategy=data\."):
            load_config("my_lora", [f"parallel={strategy}", *settings])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["train.keep_best=true", "train.validate_every=0"], "keep_best=true does nothing with train.validate_every=0"),
        (
            ["parallel=zero3", "train.recompute=attention"],
            "cannot tell from gathered weights: use train",
        ),
        (["memory.activations=offload", "train.recompute=none"], "keeps all activations of each block on the device"),
        (["train.keep_best=true", "train.validation_clips=0"], "does nothing with train.validation_clips=0, as there"),
        (["parallel.engine=ray", "parallel.shard=1/2"], "parallel.shard=1/2 and parallel.engine=ray are both given"),
        (["parallel.ray_address=auto"], "parallel.ray_address=auto does nothing with parallel.engine="),
        (["model.precision=bf16", "model.dtype=fp32"], "model.precision=bf16 contradicts model.dtype=fp32"),
        (["model.precision=int8", "lora.dora=true"], "rows of the base, which model.precision=int8 rounds"),
        (["model.precision=int8", "parallel=zero3"], "matrices that model.precision=int8 needs in one piece"),
        (["lora.dora=true", "parallel=zero3"], "rows of the base, which parallel.strategy=zero3 splits"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(more, said):
    with pytest.raises(ConfigError, match=said):
        load_config("my_lora", more)


@pytest.mark.parametrize(("key", "value"), [("lora.dora", "true"), ("parallel", "zero3")])
def test_bf16_by_its_name_goes_with_what_bf16_by_default_does(key, value):
    assert load_config("my_lora", ["model.precision=bf16", f"{key}={value}"]).model.precision == "bf16"


@pytest.mark.parametrize(
    "setting",
    [
        "parallel.shard=0/2", "parallel.shard=3/2", "parallel.shard=-1/2", "parallel.shard=²/3", "parallel.shard=all",
        "log.project=" + "x" * 129, "publish.push=a/" + "b" * 95, "publish.push=a", "name=a/./b", "name=a/../b",
    ],
)  # fmt: skip
def test_texts_that_cannot_be_used_are_refused(setting):
    with pytest.raises(ConfigError, match=f"^{setting} is not possible: it must be "):
        load_config("my_lora", [setting])


def test_texts_at_their_limits_are_taken():
    longest = ["parallel.shard=2/2", "log.project=" + "x" * 128, "publish.push=a/" + "b" * 94]
    config = load_config("my_lora", longest)
    assert config.parallel.shard == "2/2" and len(config.log.project) == 128
