"""What Hydra does itself: it may be used by the program that loads a conf, and warns."""

import warnings

from mochi_tune.config.load import load_config


def test_a_program_of_hydra_may_load_a_conf(tmp_path):
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        theirs = GlobalHydra.instance().hydra
        # A setting of their own, so that nothing is taken from what was composed before.
        assert load_config("my_lora", ["model=tiny", "seed=8571"]).seed == 8571
        assert theirs is not None and GlobalHydra.instance().hydra is theirs


def test_a_file_overrides_its_defaults_without_being_told_to(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [toy_lora]\nname: mine\ntrain: {steps: 7}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = load_config(str(tmp_path / "mine.yaml"), [])
    assert (config.name, config.train.steps, config.model.name) == ("mine", 7, "toy")
