import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mochi_tune.config.docs import settings_page
from mochi_tune.config.explain import TYPE_NAMES, describe_limits
from mochi_tune.config.load import load_config, packaged_folder
from mochi_tune.config.schema import RunConfig
from mochi_tune.config.settings import flat_settings, known_keys, rename_old, resume_rule, sections
from mochi_tune.errors import ConfigError
from mochi_tune.sampling.sampler import PRESETS

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("key", known_keys())
def test_a_setting_says_what_it_takes_and_means_in_one_line(key):
    setting = known_keys()[key]
    assert setting.choices or setting.type in TYPE_NAMES
    assert setting.meaning and "\n" not in setting.meaning and not setting.meaning.endswith(".")


def test_every_default_is_an_allowed_value():
    config = RunConfig.model_validate({"model": {"name": "x", "weights": "y"}})
    assert RunConfig.model_validate(config.model_dump()) == config


def test_the_presets_are_those_of_the_sampler():
    assert known_keys()["sample.preset"].choices == tuple(PRESETS)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("train.steps", "at least 1"),
        ("train.keep_every", "0 or more"),
        ("train.weight_decay", "0 or more and finite"),
        ("train.sigma_mean", "finite"),
        ("train.spike_factor", "above 1"),
        ("train.decay_share", "above 0 and at most 1"),
        ("lora.dropout_pattern", "from 0 to below 1"),
        ("seed", "from 0 to below 2**63"),
        ("name", ""),
    ],
)
def test_limits_are_read_from_the_schema(key, text):
    assert describe_limits(known_keys()[key]) == text


def test_what_a_run_may_change():
    rules: dict[str, set[str]] = {"bound": set(), "held": set(), "free": set()}
    for key in [*known_keys(), "global_batch", "held_out"]:
        rules[resume_rule(key)].add(key)
    lora = {key for key in known_keys() if key.startswith("lora.")}
    assert rules["held"] == {"model.name", "model.dtype", "train.optimizer"} | lora
    train = """objective sigma_distribution sigma_mean sigma_std sigma_shift sigma_stratified loss_weighting
        learning_rate learning_rate_b_ratio schedule warmup_steps decay_share weight_decay max_grad_norm
        caption_dropout ema_decay spike_policy spike_factor"""
    assert rules["bound"] == {"seed", "global_batch", "held_out", "model.precision"} | {
        f"train.{name}" for name in train.split()
    }


def test_the_page_of_settings_is_what_the_schema_says():
    page = (ROOT / "docs" / "settings.md").read_text()
    assert page == settings_page(), "run: python -m mochi_tune.config.docs > docs/settings.md"


def test_defaults_stand_in_the_schema_alone():
    assert set(yaml.safe_load((packaged_folder() / "base.yaml").read_text())) == {"defaults"}
    # What a group decides, in one of its files at least, is all that its files set.
    decided = {
        "model": {"model.name", "model.weights", "model.dtype", "data.num_frames", "data.height", "data.width"},
        "lora": {"lora.targets"},
        "memory": {"memory.dit", "memory.activations", "memory.t5_dtype"},
        "parallel": {"parallel.strategy", "parallel.context"},
    }
    decided["model"] |= {"run_dir", "data.cache", "sample.steps", "sample.threshold", "sample.guidance"}
    for group, keys in decided.items():
        for path in (packaged_folder() / group).glob("*.yaml"):
            content = yaml.safe_load(path.read_text())
            tree = {"lora": content} if group == "lora" else content
            given = {key for key, value in tree.items() if not isinstance(value, dict)}
            given |= {f"{key}.{name}" for key, value in tree.items() if key not in given for name in value}
            assert given <= keys, path


def test_the_defaults_of_a_run_are_those_of_the_schema():
    config = flat_settings(load_config("base", []))
    by_group = {"model.name", "model.weights", "lora.targets"}
    by_name = {"run_dir": "runs/my_lora", "data.cache": "cache/my_lora"}
    for key, setting in known_keys().items():
        assert key in by_group or config[key] == by_name.get(key, setting.default), key


# Where settings are read: the stories, and the rooms that take a section. What is only checked is not read.
READERS = [
    path
    for folder in ("recipes", "data_prep", "mochi_tune")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "checks.py"
]


def test_every_setting_is_read_by_some_story():
    """A key that nothing reads is a promise that nothing keeps."""
    read = {key for path in READERS for key in settings_read(path.read_text())}
    assert known_keys().keys() <= read, sorted(known_keys().keys() - read)


@pytest.mark.parametrize(
    ("code", "keys"),
    [
        ("def f(config: RunConfig):\n  return config.sample.width", {"sample.width"}),
        ("def f(config: RunConfig):\n  return config.data.width", {"data.width"}),
        ("def f(sample: SampleConfig, data):\n  return sample.width + data.height", {"sample.width"}),
        ("def f(run):\n  train, name = run.config.train, 1\n  return train.steps + name.width", {"train.steps"}),
        ("def f(config):\n  train = config.train\n  def g():\n    return train.steps", {"train.steps"}),
        ("def f(config):\n  train = config.train\ndef g(train):\n  return train.steps", set()),
        ("def f(config):\n  config.sample.width = 1\n  g(width=2, seed=3)", set()),
        ("config = load()\nwith x(config.seed) as y: pass", {"seed"}),
    ],
)
def test_what_is_read_is_reported_by_chains_of_attributes(code, keys):
    assert set(settings_read(code)) == keys


def settings_read(code: str) -> Iterator[str]:
    """Yields the dotted keys that code reads, of `config`, or of a section that it has a name for."""
    yield from _read_in(ast.parse(code), {"config": ""})


def _read_in(scope: ast.AST, names: dict[str, str]) -> Iterator[str]:
    """Yields what a function or module reads; `names` are those of sections around it, with "" for the config."""
    names = dict(names)
    classes = {cls.__name__: section for section, cls in sections().items()}
    if isinstance(scope, ast.FunctionDef | ast.Lambda):
        for argument in [*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs]:
            annotation = ast.unparse(argument.annotation).strip("'") if argument.annotation else ""
            if annotation in classes:
                names[argument.arg] = classes[annotation]
            elif argument.arg != "config":
                names.pop(argument.arg, None)
    inner, own = [], []
    stack = list(ast.iter_child_nodes(scope))
    while stack:
        node = stack.pop()
        (inner if isinstance(node, ast.FunctionDef | ast.Lambda) else own).append(node)
        stack += [] if node in inner else ast.iter_child_nodes(node)
    for node in own:
        for target, value in _assignments(node):
            if (section := _path_of(value, names)) in sections():
                names[target] = section
    for node in own:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and (key := _path_of(node, names)):
            yield from {key} & known_keys().keys()
    for node in inner:
        yield from _read_in(node, names)


def _assignments(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            pairs = zip(target.elts, node.value.elts, strict=False) if both else [(target, node.value)]
            yield from ((one.id, value) for one, value in pairs if isinstance(one, ast.Name))


def _path_of(node: ast.expr, names: dict[str, str]) -> str | None:
    """Returns the dotted key of `config.a.b`, "" of the config itself, None of anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    above = _path_of(node.value, names)
    if above is None:
        return "" if node.attr == "config" else None
    return f"{above}.{node.attr}" if above else node.attr


@pytest.mark.parametrize(("old", "now"), [("true", "block"), ("false", "none")])
def test_the_name_of_version_0_1_0_is_read_in_files(tmp_path, old, now):
    path = tmp_path / "config.yaml"
    path.write_text(f"train: {{gradient_checkpointing: {old}}}\n")
    assert load_config(str(path), []).train.recompute == now
    assert load_config(str(path), ["train.recompute=attention"]).train.recompute == "attention"
    path.write_text(f"train: {{gradient_checkpointing: {old}, recompute: auto}}\n")
    with pytest.raises(ConfigError, match=r"=block for true, .*=none for false"):
        load_config(str(path), [])
    stored = {"train.steps": 2, "train.gradient_checkpointing": old == "true"}
    rename_old(stored, "train.")
    assert stored == {"train.steps": 2, "train.recompute": now}
