import shutil
from pathlib import Path

import pytest

from mochi_tune.adapters.lora import LayerSettings
from mochi_tune.config import load
from mochi_tune.config.load import config_yaml, find_config, load_config, packaged_folder
from mochi_tune.config.lora import lora_settings
from mochi_tune.config.settings import value_of
from mochi_tune.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent


def error_of(*arguments) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("model", ["mochi_1", "tiny"])
@pytest.mark.parametrize("lora", ["attention", "attention_mlp"])
def test_every_packaged_file_composes_with_every_group(path, model, lora):
    config = load_config(path.stem, [f"model={model}", f"lora={lora}"])
    assert config.model.name == model and len(config.lora.targets) == (1 if lora == "attention" else 2)


def test_a_file_here_goes_before_the_packaged_one_and_a_path_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("my_lora") == packaged_folder() / "my_lora.yaml"
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "my_lora.yaml").write_text("defaults: [base, _self_]\nname: mine\ntrain: {steps: 7}\n")
    config = load_config("my_lora", [])
    assert (config.name, config.run_dir, config.train.steps) == ("mine", "runs/mine", 7)
    elsewhere = tmp_path / "other" / "its.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text("defaults: [base, {override model: tiny}, _self_]\ntrain: {steps: 8}\n")
    assert load_config(str(elsewhere), []).train.steps == 8


@pytest.mark.parametrize("content", ["name: mine\ntrain: {steps: 7}\n", "---\nname: mine\ntrain:\n  steps: 7\n"])
def test_a_file_without_defaults_says_what_differs_from_base(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "lora").mkdir(parents=True)
    (tmp_path / "conf" / "mine.yaml").write_text(content)
    (tmp_path / "conf" / "lora" / "queries.yaml").write_text("targets: ['blocks\\.0\\.attn\\.qkv_x']\nrank: 2\n")
    config = load_config("mine", ["model=toy", "lora=queries", "train.batch_size=3"])
    assert (config.name, config.train.steps, config.train.batch_size, config.lora.rank) == ("mine", 7, 3, 2)
    assert config.model.name == "toy"


def test_a_model_to_try_things_on_has_folders_of_its_own():
    folders = {model: load_config("my_lora", [f"model={model}"]) for model in ("mochi_1", "toy", "tiny")}
    found = {model: (config.run_dir, config.data.cache) for model, config in folders.items()}
    assert found == {
        "mochi_1": ("runs/my_lora", "cache/my_lora"),
        "toy": ("runs/my_lora_toy", "cache/my_lora_toy"),
        "tiny": ("runs/my_lora_tiny", "cache/my_lora_tiny"),
    }
    assert load_config("toy_lora", []).run_dir == "runs/toy_lora"
    assert load_config("my_lora", ["model=toy", "run_dir=runs/x"]).run_dir == "runs/x"


@pytest.mark.parametrize(("given", "read"), [("0,1", [0, 1]), ("3", [3]), ("[0,1]", [0, 1]), ("null", None)])
def test_a_list_of_numbers_needs_no_brackets(given, read):
    assert load_config("my_lora", [f"sample.seeds={given}"]).sample.seeds == read


def test_numbers_stay_numbers_where_one_is_allowed():
    sample = load_config("my_lora", ["sample.guidance=3", "sample.adapter_strength=0.5,1", "sample.adapter=1,2"]).sample
    assert (sample.guidance, sample.adapter_strength, sample.adapter) == (3, [0.5, 1], "1,2")


def test_a_group_of_the_users_own_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "lora").mkdir(parents=True)
    (tmp_path / "conf" / "mine.yaml").write_text("defaults: [base, {override model: tiny}, _self_]\n")
    (tmp_path / "conf" / "lora" / "queries.yaml").write_text("targets: ['blocks\\.0\\.attn\\.qkv_x']\nrank: 2\n")
    assert load_config("mine", ["lora=queries"]).lora.rank == 2


def test_the_printed_settings_are_read_back_the_same(tmp_path):
    config = load_config("my_lora", ["model=tiny", "train.steps=12", "sample.prompt=a, (b): 'c' \\"])
    path = tmp_path / "config.yaml"
    path.write_text(config_yaml(config))
    assert load_config(str(path), []) == config


@pytest.mark.parametrize(
    "prompt",
    ["a teacup shatters", "a cat, running (fast): it's $5 = 3", 'say "hi"', "back\\slash \\", "'quoted'", "[x]"],
)
def test_prompts_need_no_quoting(prompt):
    assert load_config("my_lora", [f"sample.prompt={prompt}"]).sample.prompt == prompt


@pytest.mark.parametrize("backslashes", range(4))
@pytest.mark.parametrize("reference", ["${seed}", "${oc.env:HOME}", "${", "$", "'"])
def test_a_prompt_is_text_and_stays_so_when_its_settings_are_read_back(tmp_path, reference, backslashes):
    path, text = tmp_path / "config.yaml", "\\" * backslashes
    prompt = f"a {text}{reference} b{text}"
    config = load_config("my_lora", [f"sample.prompt={prompt}"])
    assert config.sample.prompt == prompt
    path.write_text(config_yaml(config))
    assert load_config(str(path), []) == config


def test_a_value_may_refer_to_another_setting(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [base, {override parallel: context}, _self_]\nname: x\ndata: {cache: '${run_dir}/c'}\n")
    config = load_config(str(path), ["parallel.num_processes=3", "run_dir=out/${name}_${train.steps}"])
    assert (config.data.cache, config.parallel.context) == ("out/x_1000/c", 3)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("name=123", "name", "123"),
        ("name=true", "name", "true"),
        ("train.learning_rate=1e-3", "train.learning_rate", 0.001),
        ("train.learning_rate=1", "train.learning_rate", 1.0),
        ("train.steps=5", "train.steps", 5),
        ("train.spike_factor=inf", "train.spike_factor", float("inf")),
        ("train.spike_policy=off", "train.spike_policy", "off"),
        ("lora.dora=yes", "lora.dora", True),
        ("lora.targets=[1,2]", "lora.targets", ["1", "2"]),
        (r"lora.targets=['blocks\.\d+\.attn\.qkv_x']", "lora.targets", [r"blocks\.\d+\.attn\.qkv_x"]),
        ("lora.alpha_pattern={a: 1e-3}", "lora.alpha_pattern", {"a": 0.001}),
        ('train.sample_prompts=["a, b", c d]', "train.sample_prompts", ["a, b", "c d"]),
        ("sample.seeds=[1,2]", "sample.seeds", [1, 2]),
        ("sample.seeds=null", "sample.seeds", None),
        ("sample.adapter=null", "sample.adapter", None),
        ("sample.adapter=3", "sample.adapter", "3"),
        ("sample.guidance=2", "sample.guidance", 2.0),
        ("sample.guidance=[2,1]", "sample.guidance", [2.0, 1.0]),
        ("memory.tiles=[2,2]", "memory.tiles", [2, 2]),
    ],
)
def test_a_value_is_read_as_its_type(tmp_path, override, key, value):
    config = load_config("my_lora", [override])
    assert value_of(config, key) == value and type(value_of(config, key)) is type(value)
    path = tmp_path / "config.yaml"
    path.write_text(config_yaml(config))
    assert load_config(str(path), []) == config


def test_several_adapters_are_a_list():
    sample = load_config("my_lora", ["sample.adapter=[a.safetensors,b.safetensors]", "sample.adapter_strength=[1,0.5]"])
    assert sample.sample.adapter == ["a.safetensors", "b.safetensors"] and sample.sample.adapter_strength == [1, 0.5]
    assert load_config("my_lora", ["sample.adapter=runs/x (1)/a.safetensors"]).sample.adapter.endswith(
        "(1)/a.safetensors"
    )


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("trian.steps=3", "trian.steps is not a setting; did you mean train.steps?"),
        ("steps=3", "steps is not a setting; did you mean train.steps?"),
        ("zzz=3", "zzz is not a setting; --help all lists them."),
        ("train.steps=x", "train.steps=x does not fit: it takes a whole number."),
        ("train.steps=true", "train.steps=true does not fit: it takes a whole number."),
        ("train.steps=5.0", "train.steps=5.0 does not fit: it takes a whole number."),
        ("train.steps=null", "train.steps=null does not fit: it takes a whole number."),
        ("train.steps=1,2", "train.steps=1,2 does not fit: it takes a whole number."),
        ("train.steps=choice(1,2)", "train.steps=choice(1,2) does not fit: it takes a whole number."),
        ("train.learning_rate=true", "train.learning_rate=true does not fit: it takes a number."),
        ("train.spike_factor=nan", "train.spike_factor=nan is not possible: it must be above 1."),
        ("run_dir=${nam}", r"does not fit: ${nam} is not the name of a setting, as ${name} is: write \${ where it is"),
        ("run_dir=${run_dir}", "run_dir=${run_dir} does not fit: a reference ${...} in it leads back to it"),
        ("run_dir=a${", "run_dir=a${ does not fit: ${ is not the name of a setting, as ${name} is: write"),
        ("name=null", "name=null does not fit: it takes text."),
        ("lora.targets=[a", 'lora.targets=[a does not fit: it takes a list, ["a", "b"].'),
        (
            "sample.seeds=[1.5]",
            "sample.seeds=[1.5] does not fit: it takes a list of whole numbers, [0, 1, 2]",
        ),
        ("sample.guidance=[-1,2]", "sample.guidance[0]=-1.0 is not possible: it must be 0 or more and finite."),
        (
            "sample.guidance=x",
            "sample.guidance=x does not fit: it takes a number, a list of numbers, [1, 0.5]",
        ),
        ("sample.adapter_strength=nan", "sample.adapter_strength=nan is not possible: it must be finite."),
        ("sample.compare=me", "sample.compare=me is not possible: use base or null."),
        ("sample.steps=0", "sample.steps=0 is not possible: it must be from 1 to 10000."),
        ("sample.linear_steps=10001", "sample.linear_steps=10001 is not possible: it must be from 1 to 10000."),
        ("sample.seeds=0-3", "sample.seeds=0-3 does not fit: it takes a list of whole numbers, [0, 1, 2], or null."),
        ("train.steps=0-3", "train.steps=0-3 does not fit: it takes a whole number."),
        ("sample.threshold=2", "sample.threshold=2.0 is not possible: it must be above 0 and below 1."),
        ("sample.preset=slow", "sample.preset=slow is not possible: use quality or balanced or fast or fastmochi."),
        ("train.steps=0", "train.steps=0 is not possible: it must be at least 1."),
        ("train.learning_rate=0", "train.learning_rate=0.0 is not possible: it must be above 0 and finite."),
        ("train.caption_dropout=1", "train.caption_dropout=1.0 is not possible: it must be from 0 to below 1."),
        ("train.objective=genmo", "train.objective=genmo is not possible: use sampler or official or unnormalised."),
        ("train.sigma_distribution=mode", "use uniform or logit_normal or shifted."),
        ("train.loss_weighting=sigma_sqrt", "use none or bell or cosmap."),
        ("train.optimizer=lion", "use adamw or adamw_8bit or adafactor or prodigy or muon or schedule_free."),
        ("train.schedule=cos", "use cosine or linear or constant or wsd."),
        ("train.sigma_std=0", "train.sigma_std=0.0 is not possible: it must be above 0 and finite."),
        ("train.sigma_shift=-1", "train.sigma_shift=-1.0 is not possible: it must be above 0 and finite."),
        ("train.sigma_mean=nan", "train.sigma_mean=nan is not possible: it must be finite."),
        ("train.learning_rate_b_ratio=0", "train.learning_rate_b_ratio=0.0 is not possible: it must be above 0"),
        ("train.decay_share=0", "train.decay_share=0.0 is not possible: it must be above 0 and at most 1."),
        ("train.decay_share=1.1", "train.decay_share=1.1 is not possible: it must be above 0 and at most 1."),
        (
            "train.sigma_shift=3",
            "does nothing with train.sigma_distribution=uniform: use train.sigma_distribution=shifted",
        ),
        ("train.sigma_mean=1", "use train.sigma_distribution=logit_normal, or leave it out."),
        ("train.sigma_std=2", "use train.sigma_distribution=logit_normal, or leave it out."),
        (
            "train.decay_share=0.5",
            "train.decay_share=0.5 does nothing with train.schedule=cosine: use train.schedule=wsd",
        ),
        (
            "train.optimizer=prodigy",
            "which finds the rate itself and takes this as a factor on it: use train.learning_rate=1.",
        ),
        ("train.optimizer=schedule_free", "use train.schedule=constant."),
        (
            "data.caption_variants=3",
            "data.caption_variants=3 does nothing with data.tag_dropout=0: set data.tag_dropout",
        ),
        ("data.captions=all", "data.captions=all is not possible: use one or lines."),
        ("data.tag_dropout=1", "data.tag_dropout=1.0 is not possible: it must be from 0 to below 1"),
        ("model=mochi", "model=mochi does not exist: use one of mochi_1, tiny, toy."),
        ("data.num_frames=40", "num_frames=40 does not fit the VAE, which takes 6k+1: use 37 or 43."),
        ("sample.width=100", "width=100 does not fit the model, which takes multiples of 16 pixels: use 96 or 112."),
        ("train.learning_rate=inf", "train.learning_rate=inf is not possible"),
        ("seed=99999999999999999999", "it must be from 0 to below 2**63"),
        ("run_dir=", "run_dir is empty: name one."),
        ("log.project=a/b", "log.project=a/b is not possible: it must be up to 128 characters, none of"),
        ("log.wandb=on", "log.wandb=on is not possible: use disabled or offline or online."),
        ("log.wandb_project=a", "log.wandb_project is not a setting; did you mean log.project?"),
        ("lora.targets=blocks.*", 'lora.targets=blocks.* does not fit: it takes a list, ["a", "b"].'),
        ("lora.rank_pattern=8", r"does not fit: it takes whole numbers by pattern, {'blocks\.0\..*': 8}."),
        ("lora.rank_pattern={a: 0.5}", "lora.rank_pattern={a: 0.5} does not fit: it takes whole numbers by pattern"),
        ("lora.rank_pattern={a: 8", "lora.rank_pattern={a: 8 does not fit"),
        ("lora.rank_pattern={a: 0}", "lora.rank_pattern: 'a': 0 is not possible: it must be at least 1."),
        ("lora.rank_pattern={1: 8}", "lora.rank_pattern={1: 8} does not fit"),
        ("lora.alpha_pattern={a: 0}", "lora.alpha_pattern: 'a': 0.0 is not possible: it must be above 0 and finite."),
        ("lora.dropout_pattern={a: 1}", "lora.dropout_pattern: 'a': 1.0 is not possible: it must be from 0 to below"),
        ("lora.rank_patern={a: 1}", "lora.rank_patern is not a setting; did you mean lora.rank_pattern?"),
        ("lora.init_from=", "lora.init_from is empty: name one, or null."),
        ("lora.dora=yess", "lora.dora=yess does not fit: it takes true or false."),
        ("train.steps", "'train.steps' is not a setting: settings are written key=value"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(override, text):
    assert text in error_of("my_lora", [override])


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.optimizer=prodigy", "train.learning_rate=1"),
        ("train.optimizer=schedule_free", "train.schedule=constant", "train.learning_rate_b_ratio=16"),
        ("train.schedule=wsd", "train.decay_share=1"),
        ("train.sigma_distribution=logit_normal", "train.sigma_mean=-0.5", "train.sigma_std=1.5"),
        ("train.sigma_distribution=shifted", "train.sigma_shift=3", "train.sigma_stratified=true"),
        ("parallel=zero2", "train.learning_rate_b_ratio=4", "train.loss_weighting=bell"),
    ],
)
def test_settings_that_fit_together_are_taken(overrides):
    load_config("my_lora", list(overrides))


def test_an_optimizer_that_cannot_be_sharded_is_refused():
    text = error_of("my_lora", ["parallel=zero3", "train.optimizer=muon"])
    assert "train.optimizer=muon does not fit parallel.strategy=zero3" in text


@pytest.mark.parametrize(
    ("yaml", "text"),
    [
        ("defaults: [base, _self_]\ntrain: {stepps: 4}\n", "train.stepps is not a setting; did you mean train.steps?"),
        ("defaults: [base, _self_]\ntrain: {steps: four}\n", "train.steps=four does not fit: it takes a whole number."),
        ("defaults: [base, _self_]\nmodel: tiny\n", "model is a section: choose its file by model=NAME"),
        ("defaults: [base, _self_]\nlora: {rank_pattern: {'a.*b': x}}\n", "lora.rank_pattern: 'a.*b': x does not fit"),
        ("defaults: [base, _self_]\nlora: {rank_pattern: 4}\n", "lora.rank_pattern=4 does not fit: it takes whole"),
        ("defaults: [base, _self_]\ntrain: 5\n", "train is a section: write its settings below it"),
        ("defaults: [base, _self_]\ntrain: [1]\n", "train is a section: write its settings below it"),
        ("defaults: [base, _self_]\ntrain.steps: 4\n", "train.steps is not a setting; write it as train: {steps: ...}"),
        ("defaults: [base, _self_]\ntrain: {steps: true}\n", "train.steps=true does not fit: it takes a whole number."),
        ("defaults: [base, _self_]\ntrain: {steps: 4.0}\n", "train.steps=4.0 does not fit: it takes a whole number."),
        ("defaults: [base, _self_]\ntrain: {steps: 0}\n", "train.steps=0 is not possible: it must be at least 1."),
        ("defaults: [base, _self_]\ntrain: {sample_prompts: [a, null]}\n", "train.sample_prompts[1]=null does not fit"),
        ("defaults: [base, _self_]\nlora: {rank_pattern: {1: 4}}\n", "lora.rank_pattern: 1 does not fit"),
        ("defaults: [base, _self_]\n1: x\n", "1 is not a setting"),
        ("defaults: toy_lora\n", "defaults must be a list, got toy_lora: write defaults: [base, _self_]."),
        ("defaults: [_self_]\nname: x\n", "sets no model.name, model.weights: put base"),
        ("- a\n- b\n", "contains a list instead of settings"),
        ("defaults: [bass, _self_]\n", "bass in defaults does not exist; did you mean base?"),
        ("defaults: [toy_lora, nope]\n", "nope in defaults does not exist: use one of base, "),
        ("model: toy\n", "model is a section: choose its file by model=NAME"),
        ("train:\n  steps: 4\n :", "is not YAML: line 3"),
        ("defaults: [base, {override model: toyy}, _self_]\n", "model: toyy in defaults does not exist; did you mean"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_it(tmp_path, yaml, text):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml)
    message = error_of(str(path), [])
    assert text in message and str(path) in message


def test_a_file_that_is_not_text_is_one_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"name: \xff\xfe")
    assert "is not UTF-8 text" in error_of(str(path), [])


def test_an_unknown_file_names_the_nearest():
    assert "did you mean conf=my_lora?" in error_of("my_lor", [])


def test_patterns_are_read_from_a_file_and_a_given_mapping_takes_its_place(tmp_path):
    path = tmp_path / "mine.yaml"
    text = r"{rank_pattern: {'blocks\.0\..*': 4, '.*qkv_[xy]': 4}, alpha_pattern: {'.*w1': 2}, rslora: true}"
    path.write_text(f"defaults: [base, {{override model: tiny}}, _self_]\nlora: {text}\n")
    lora = load_config(str(path), []).lora
    assert lora.rank_pattern == {r"blocks\.0\..*": 4, ".*qkv_[xy]": 4} and lora.rslora and not lora.dora
    assert lora.alpha_pattern == {".*w1": 2.0} and lora.dropout_pattern == {}
    given = r"lora.rank_pattern={'blocks\.(1|2)\.attn\..*': 8, .*proj_x: 2}"
    config = load_config(str(path), [given, "lora.dropout_pattern={a: 0}", "lora.init_from=runs/x (1)/a.safetensors"])
    assert config.lora.rank_pattern == {r"blocks\.(1|2)\.attn\..*": 8, ".*proj_x": 2}
    assert config.lora.alpha_pattern == {".*w1": 2.0} and config.lora.init_from == "runs/x (1)/a.safetensors"
    path.write_text(config_yaml(config))
    assert load_config(str(path), []) == config


def test_the_settings_of_each_layer_come_from_the_patterns():
    names = [f"blocks.{i}.attn.{kind}" for i in range(2) for kind in ("qkv_x", "proj_x", "other")]
    given = [r"lora.rank_pattern={'blocks\.1\..*': 8}", "lora.dropout_pattern={.*qkv_x: 0.5}", "lora.rslora=true"]
    settings = lora_settings(load_config("my_lora", [*given, "lora.alpha=4"]).lora, names)
    assert list(settings) == [name for name in names if "other" not in name]
    assert settings["blocks.1.attn.qkv_x"] == LayerSettings(8, 4.0, 0.5, True)
    assert settings["blocks.0.attn.proj_x"] == LayerSettings(16, 4.0, 0.0, True)
    with pytest.raises(ConfigError, match=r"lora.alpha_pattern: '\.\*other' matches no chosen layer"):
        lora_settings(load_config("my_lora", ["lora.alpha_pattern={.*other: 8}"]).lora, names)


def test_a_dora_needs_whole_rows_of_the_base():
    assert load_config("my_lora", ["lora.dora=true", "parallel=zero2"]).lora.dora
    assert "use parallel.strategy=zero2." in error_of("my_lora", ["lora.dora=true", "parallel=zero3"])


@pytest.mark.parametrize(
    "key", ["data.videos", "data.cache", "run_dir", "model.weights", "lora.init_from", "resume_from", "sample.adapter"]
)
def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/of/mine")
    assert value_of(load_config("my_lora", [f"{key}=~/some/where"]), key) == "/home/of/mine/some/where"


def test_a_packaged_file_that_changes_is_read_anew(tmp_path, monkeypatch):
    # In a clone, the packaged files are those that a user edits while the page in the browser runs.
    shutil.copytree(packaged_folder(), tmp_path / "conf")
    monkeypatch.setattr(load, "packaged_folder", lambda: tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "conf" / "mine.yaml"
    for steps in (7, 70):
        own.write_text(f"train:\n  steps: {steps}\n")
        assert load_config(str(own), []).train.steps == steps
    group = tmp_path / "conf" / "lora" / "attention.yaml"
    group.write_text(group.read_text() + "rank: 11\n")
    assert load_config(str(own), []).lora.rank == 11


def test_a_yml_file_is_read_as_a_yaml_file_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("conf").mkdir()
    Path("conf/mine.yml").write_text("defaults: [base, _self_]\nname: mine\n")
    Path("plain.yml").write_text("name: plain\n")
    assert load_config("mine", []).name == "mine"
    assert load_config("conf/mine.yml", []).name == "mine" and load_config("plain.yml", []).name == "plain"


def test_a_group_of_ones_own_goes_before_a_packaged_one_for_every_conf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "memory").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("mine", "80gb"):
        (tmp_path / f"conf/memory/{name}.yaml").write_text("dit: stream\n")
    (tmp_path / "other/y.yaml").write_text("name: y\n")
    for conf in ("my_lora", "other/y.yaml"):
        assert [load_config(conf, [f"memory={name}"]).memory.dit for name in ("mine", "80gb")] == ["stream", "stream"]
    (tmp_path / "conf/memory/80gb.yaml").unlink()
    assert load_config("my_lora", ["memory=80gb"]).memory.dit == "resident"


def test_prompts_of_eval_videos_say_what_they_say():
    config = load_config("my_lora", ['train.sample_prompts=["costs ${name} x", "b"]'])
    assert config.train.sample_prompts == ["costs ${name} x", "b"]
