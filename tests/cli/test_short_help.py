import pytest

from mochi_tune.cli.short_help import check_form
from mochi_tune.errors import ConfigError


@pytest.mark.parametrize(
    ("verb", "words", "text"),
    [
        ("train", ["--save_every_n_steps", "10"], "key=value; did you mean train.checkpoint_every=10?"),
        ("train", ["--rank", "8"], "did you mean lora.rank=8?"),
        ("train", ["--train.recompute=block"], "did you mean train.recompute=block?"),
        ("train", ["--model", "tiny"], "did you mean model=tiny?"),
        ("inspect", ["--out", "page"], "did you mean out=page?"),
        ("sample", ["--adapter", "x.safetensors"], "did you mean adapter=x.safetensors?"),
        # What would be refused next is not suggested: a value that is the other trainer's, and unknown words.
        ("train", ["--gradient_checkpointing", "true"], "did you mean train.recompute=block for true, train.recompute"),
        ("train", ["--validation_prompts", "a cat"], "did you mean train.sample_prompts?"),
        ("train", ["--resolution", "480"], "did you mean data.height and data.width?"),
        ("train", ["--blocks_to_swap", "20"], "did you mean memory=16gb?"),
        ("train", ["--no_such_word", "3"], "no_such_word is not a setting; --help all lists them."),
        ("train", ["--no_such_word=3"], "no_such_word is not a setting; --help all lists them."),
        # A word after conf= or a number is not a part of its value.
        ("train", ["train.steps", "5"], "'train.steps' has no value: settings are written key=value; did you mean "),
        ("sample", ["a", "red", "square"], "did you mean 'prompt=a red square'?"),
        ("sample", ["steps=5", "a", "cat"], "did you mean 'prompt=a cat'?"),
        ("sample", ["prompt=a", "red", "square"], 'a value with spaces, prompt="a red square".'),
        ("inspect", ["data.videos=my", "films"], 'a value with spaces, data.videos="my films".'),
        ("inspect", ["out=my", "page"], 'a value with spaces, out="my page".'),
        ("sample", ["adapter_strength=[1,", "0.5]"], 'a value with spaces, adapter_strength="[1, 0.5]".'),
        ("sample", ["seeds=0,", "1"], 'a value with spaces, seeds="0, 1".'),
        # Options that have no value there.
        ("train", ["--gradient_checkpointing", "--lr", "1e-4"], "did you mean train.recompute=block for true, "),
        ("train", ["--cache_latents"], "leave it out: `prepare` caches latents and captions."),
        # Spaces around =.
        ("sample", ["steps", "=", "5"], "'steps' has a space before its =: settings are written key=value; did you "),
        ("sample", ["negative_prompt=", "--steps", "50"], "'--steps' has no value: "),
        ("sample", ["steps=", "5"], "'steps=' has a space behind it: "),
        ("sample", ["steps", "=", "5"], "did you mean steps=5?"),
        ("train", ["train.steps", "=5"], "did you mean train.steps=5?"),
        ("train", ["train.steps=", "5"], "did you mean train.steps=5?"),
        ("sample", ["prompt", "=", "a", "cat", "seeds=0"], "did you mean 'prompt=a cat'?"),
        ("train", ["--verbose"], "--verbose is not an option: use --help or --cfg"),
    ],
)
def test_what_is_suggested_is_taken(verb, words, text):
    with pytest.raises(ConfigError) as caught:
        check_form(verb, ["conf=my_lora", *words])
    assert text in str(caught.value)
    assert "no_such_word=" not in str(caught.value).partition(":")[2]
