"""A conf that is loaded by a program which is Hydra's, too."""

from mochi_tune.config.load import load_config


def test_a_program_of_hydra_may_load_a_conf(tmp_path):
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        theirs = GlobalHydra.instance().hydra
        # A setting of their own, so that nothing is taken from what was composed before.
        assert load_config("my_lora", ["model=tiny", "seed=8571"]).seed == 8571
        assert theirs is not None and GlobalHydra.instance().hydra is theirs
