import re

import pytest

from mochi_tune.config.explain import SYNONYMS, nearest
from mochi_tune.config.load import load_config, packaged_folder
from mochi_tune.config.settings import GROUPS, known_keys
from mochi_tune.errors import ConfigError

KNOWN = [*known_keys(), *GROUPS]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("gradient_checkpointing", "train.recompute=block for true, train.recompute=none for false"),
        ("activation_checkpointing", "train.recompute=block for true, train.recompute=none for false"),
        ("validation_prompts", "train.sample_prompts"),
        ("validation_steps", "train.validate_every"),
        ("frame_extraction", "data.clips"),
        ("num_repeats", "data.sources"),
        ("save_every", "train.checkpoint_every"),
        ("save_every_n_steps", "train.checkpoint_every"),
        ("save_every_n_epochs", "train.checkpoint_every"),
        ("network_weights", "lora.init_from"),
        ("optimizer_args", "train.weight_decay"),
        ("checkpointing_steps", "train.checkpoint_every"),
        ("train.checkpointing_steps", "train.checkpoint_every"),
        ("timestep_sampling", "train.sigma_distribution"),
        ("weighting_scheme", "train.sigma_distribution"),
        ("discrete_flow_shift", "train.sigma_shift"),
        ("report_to", "log.wandb, log.tensorboard or log.trackio"),
        ("train_data_dir", "data.videos"),
        ("data_dir", "data.videos"),
        ("instance_data_root", "data.videos"),
        ("dataset_config", "data.sources"),
        ("id_token", "data.caption_prefix"),
        ("blocks_to_swap", "memory=16gb"),
        ("fp8_base", "model.precision=fp8"),
        ("num_steps", "train.steps"),
        ("optimizer.lr", "train.learning_rate"),
        ("train.grad_clip", "train.max_grad_norm"),
        ("train.save_interval", "train.checkpoint_every"),
    ],
)
def test_words_of_other_trainers_lead_to_the_setting_that_does_it(word, meant):
    assert nearest(word, KNOWN) == f"; did you mean {meant}?"


def test_what_other_trainers_must_be_told_is_left_out():
    assert nearest("cache_latents", KNOWN) == "; leave it out: `prepare` caches latents and captions."
    assert "by `mochi-tune lora bake`, and set model.transformer" in nearest("base_weights", KNOWN)


@pytest.mark.parametrize("word", ["num_workers", "network_module", "train.foo", "max_data_loader"])
def test_a_word_that_is_like_no_setting_gets_no_guess(word):
    assert nearest(word, KNOWN) == "; --help all lists them."


def test_a_typo_in_a_word_without_its_section_leads_to_the_settings_of_that_word():
    assert nearest("stepz", KNOWN) == "; did you mean train.steps or sample.steps?"
    assert nearest("learning_rat", KNOWN) == "; did you mean train.learning_rate?"


def test_a_typo_in_the_name_of_a_section_leads_to_it():
    assert nearest("trian", KNOWN) == "; did you mean train?"


def test_each_synonym_is_of_a_setting_that_there_is():
    for name in re.split(r", | or ", ", ".join(name for names in SYNONYMS.values() for name in names)):
        key, equals, value = name.partition(" for ")[0].partition("=")
        known = key in known_keys() and (not equals or value in known_keys()[key].choices)
        assert known or (key in GROUPS and (packaged_folder() / key / f"{value}.yaml").exists()), name


@pytest.mark.parametrize(
    ("override", "text"),
    [
        # `adapter=$UNSET` must not mean the current folder.
        ("sample.adapter=", "sample.adapter is empty: name one, or null."),
        ("sample.adapter=['']", "sample.adapter[0] is empty: name one, or null."),
        ("sample.prompts=", "sample.prompts is empty: name one, or null."),
        ("sample.init_video= ", "sample.init_video is empty: name one, or null."),
        ("sample.out=", "sample.out is empty: name one, or null."),
        ("sample.prompt_cache=", "sample.prompt_cache is empty: name one."),
        ("data.preview=", "data.preview is empty: name one, or null."),
        ("resume_from=", "resume_from is empty: name one, or null."),
        ("model.transformer=", "model.transformer is empty: name one, or null."),
        ("data.sources=[{folder: ''}]", "data.sources[0] names no folder"),
        ("train.sample_prompts=['a cat', '']", "train.sample_prompts[1] is empty: write one, or leave it out."),
        (
            'sample.block_strength={"0-15":0.5,47:0}',
            "or a list of these for each adapter, with a space after each colon.",
        ),
        ("sample.block_strength={0-15:0.5,47:0}", "with a space after each colon."),
        ("sample.block_strength={0-15: x}", "numbers by block, {0-15: 0.5}, or a list of these for each adapter."),
        ("name=..", "name=.. is not possible: it must be a name such as my_lora, without . or .. as a folder."),
        ("name=a/../../b", "without . or .. as a folder"),
        ("publish.push=a", "publish.push=a is not possible: it must be owner/name, of letters, digits, -, . and _."),
    ],
)
def test_an_empty_or_impossible_value_is_refused(override, text):
    with pytest.raises(ConfigError) as caught:
        load_config("my_lora", [override])
    assert text in str(caught.value)
