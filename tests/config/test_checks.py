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
    ],
)
def test_settings_that_do_nothing_beside_others_are_refused(more, said):
    with pytest.raises(ConfigError, match=said):
        load_config("my_lora", more)
