"""References to other settings, in files and on the command line."""

import itertools

import pytest

from mochi_tune.config.load import load_config
from mochi_tune.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("run_dir=${oc.env:LEAK}", "${oc.env:LEAK}"),
        ("data.sources=[{folder: '${oc.${name}:LEAK}'}]", "${oc.${name}"),
        ("lora.rank_pattern={a: '${oc.env:LEAK}'}", "${oc.env:LEAK}"),
    ],
)
def test_a_given_value_does_not_read_the_environment(override, shown):
    with pytest.raises(ConfigError) as error:
        load_config("my_lora", [override])
    assert str(error.value).startswith(f"{override} does not fit: {shown} is not the name of a setting, as ${{name}}")


def test_a_given_mapping_has_no_aliases():
    with pytest.raises(ConfigError, match="does not fit: it takes whole numbers by pattern"):
        load_config("my_lora", ["lora.rank_pattern={a: &a 8, b: *a}"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [("it costs ${5}", "${5}"), ("runs/${oc.${name}:LEAK}", "${oc.${name}"), ("${.name}", "${.name}"), ("a ${", "${")],
)
def test_a_reference_is_the_name_of_a_setting(tmp_path, text, shown):
    (tmp_path / "a.yaml").write_text(f"name: a\nrun_dir: '{text}'\n")
    with pytest.raises(ConfigError) as error:
        load_config(str(tmp_path / "a.yaml"), [])
    assert f"line 2: {shown} is not the name of a setting, as ${{name}} is: write \\${{ where" in str(error.value)
    escaped = text.replace("${", "\\${")
    (tmp_path / "a.yaml").write_text(f"run_dir: '{escaped}'\n")
    assert load_config(str(tmp_path / "a.yaml"), []).run_dir == text


def test_references_that_expand_to_billions_of_texts_are_refused(tmp_path):
    keys = ("name", "run_dir", "log.project", "data.videos", "data.cache", "data.caption_prefix", "data.caption_suffix")
    bomb = [f"{key}={f'${{{following}}}' * 10}" for key, following in itertools.pairwise(keys)]
    with pytest.raises(ConfigError, match=r"have 6[0-9] references such as .*, the maximum is 20: write the values"):
        load_config("my_lora", bomb)
    # Hydra resolves them while it composes the files.
    text = "".join(f"{key}: '{'${name}' * 11}'\n" for key in ("run_dir", "resume_from"))
    (tmp_path / "b.yaml").write_text(text)
    (tmp_path / "a.yaml").write_text("defaults: [base, b, _self_]\nrun_dir: a\n")
    with pytest.raises(ConfigError, match="the maximum is 20"):
        load_config(str(tmp_path / "a.yaml"), [])
