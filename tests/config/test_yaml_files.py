"""What is looked at in configuration files before anything is made of them."""

import re
from pathlib import Path

import pytest

from mochi_tune.config.load import load_config
from mochi_tune.errors import ConfigError


def test_text_that_yaml_reads_as_another_number_is_refused(tmp_path):
    for line, said in (
        ("name: 007", '007 is read as the number 7: put the text in quotes, "007"'),
        ("publish: {title: 1_000}", "1_000 is read as the number 1000"),
        ("train: {sample_prompts: [a cat, 1e3]}", "1e3 is read as the number 1000.0"),
        ("name: ???", "??? is not a value"),
    ):
        (tmp_path / "a.yaml").write_text(f"{line}\n")
        with pytest.raises(ConfigError, match=re.escape(said)):
            load_config(str(tmp_path / "a.yaml"), [])
    (tmp_path / "a.yaml").write_text('name: "007"\ntrain: {learning_rate: 1e-3, sample_prompts: [12, 0.5]}\n')
    config = load_config(str(tmp_path / "a.yaml"), [])
    assert (config.name, config.train.learning_rate, config.train.sample_prompts) == ("007", 1e-3, ["12", "0.5"])


def test_files_that_a_conf_builds_on_are_looked_at_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAK", "secret")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "memory").mkdir(parents=True)
    for file, text in (("common", "publish: {title: '${oc.env:LEAK}'}"), ("memory/evil", "t5_dtype: ${oc.env:LEAK}")):
        (tmp_path / f"conf/{file}.yaml").write_text(f"{text}\n")
    (tmp_path / "conf/a.yaml").write_text("defaults: [base, common, _self_]\n")
    (tmp_path / "conf/b.yaml").write_text("name: b\n")
    for name, more in (("a", []), ("b", ["memory=evil"]), ("my_lora", ["memory=evil"])):
        with pytest.raises(ConfigError, match=r"line 1: \$\{oc.env:LEAK\} is not the name of a setting"):
            load_config(name, more)
    # A file of a group builds on those of the group, and not on those of the same name beside the conf.
    (tmp_path / "conf/evil.yaml").write_text("name: evil\n")
    (tmp_path / "conf/memory/good.yaml").write_text("defaults: [evil]\n")
    with pytest.raises(ConfigError, match=r"memory/evil\.yaml line 1"):
        load_config("b", ["memory=good"])


@pytest.mark.parametrize(
    "entry",
    ["evil@_global_", "evil.yaml", "evil.YML", "../evil", "{lora@_global_: evil}", "{lora: evil.yaml}", "x/../evil",
     "hydra/evil", "{override hydra/launcher: evil}", "'{evil}'", "{lora: {evil: 1}}", "_self_@train"],
)  # fmt: skip
def test_names_in_defaults_are_plain(tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(f"defaults: [base, {entry}, _self_]\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: .* in defaults is not possible: write the plain name of a file"):
        load_config("a.yaml", [])


def test_a_name_in_defaults_may_have_a_group_and_be_optional(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    Path("own/b c-1.0+x.yaml").write_text("# @package _global_\nname: mine\n")
    Path("a.yaml").write_text(
        "defaults: [base, {optional none: x}, {own: [b c-1.0+x]}, {override model: tiny}, _self_]\n"
    )
    config = load_config("a.yaml", [])
    assert (config.name, config.model.name) == ("mine", "tiny")


def test_a_base_of_version_0_1_0_that_hides_the_packaged_one_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("conf").mkdir()
    Path("conf/base.yaml").write_text("defaults: [run_schema, _self_, {model: mochi_1}]\nname: x\n")
    with pytest.raises(ConfigError, match=r"conf/base\.yaml is a base\.yaml of mochi-tune 0\.1\.0.* and delete it\."):
        load_config("my_lora", [])


def test_words_that_yaml_reads_as_true_or_false_are_no_text(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data:\n  caption_prefix: no\n")
    with pytest.raises(ConfigError, match=r"caption_prefix=.* must be text in quotes"):
        load_config(str(path), [])
    path.write_text('data:\n  caption_prefix: "no"\n')
    assert load_config(str(path), []).data.caption_prefix == "no"
    assert load_config("my_lora", ["data.caption_prefix=no"]).data.caption_prefix == "no"


def test_defaults_that_lead_in_a_circle_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("conf").mkdir()
    for name, other in (("selfy", "selfy"), ("aa", "bb"), ("bb", "aa")):
        Path(f"conf/{name}.yaml").write_text(f"defaults: [{other}, _self_]\n")
    for name in ("selfy", "aa"):
        with pytest.raises(ConfigError, match="its defaults lead back to itself"):
            load_config(name, [])
