import pytest

from mochi_tune.adapters.lora import linear_shapes, select_layers
from mochi_tune.cli.toy import run_experiment
from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.config.settings import flat_settings
from mochi_tune.errors import ConfigError
from mochi_tune.toy.arms import DEFAULT, arms, run_names
from mochi_tune.toy.lesson import lesson_words
from mochi_tune.toy.world import SHAPES
from mochi_tune.weights.folder import WeightsFolder


def test_the_layers_are_compared_at_equal_parameter_counts():
    shapes = linear_shapes(WeightsFolder(weights_folder(load_config("toy_lora", []))).dit_skeleton())
    counts = []
    for arm in arms()["layers"].values():
        lora = load_config("toy_lora", list(arm.settings)).lora
        counts.append(lora.rank * sum(sum(shapes[name]) for name in select_layers(shapes, lora.targets)))
        assert lora.alpha == 2 * lora.rank
    assert len(counts) == 2 and abs(counts[0] / counts[1] - 1) < 0.02, counts


def test_every_arm_differs_from_the_default_and_has_a_run_of_its_own():
    names, default = run_names(), flat_settings(load_config("toy_lora", []))
    for those in arms().values():
        found = set()
        for arm in those.values():
            settings = flat_settings(load_config("toy_lora", list(arm.settings)))
            changed = {key for key in settings if settings[key] != default[key]}
            # A setting with its default value would train the default arm under another name.
            assert len(changed) == len(arm.settings)
            found.add(names[arm])
        assert len(found) == len(those)
    assert names[DEFAULT] == "default" and len(set(names.values())) == len(names)


def test_the_fewest_clips_show_every_shape():
    fewest = min(arm.num_clips for arm in arms()["clips"].values())
    assert fewest == 4 and {words.shape for words in lesson_words()[0][:fewest]} == set(SHAPES)


def test_the_command_line_offers_every_experiment():
    with pytest.raises(ConfigError) as error:
        run_experiment(["what=none"])
    offered = str(error.value).partition("use one of ")[2].rstrip(".").split(", ")
    assert sorted(offered) == sorted([*arms(), "guidance"])
