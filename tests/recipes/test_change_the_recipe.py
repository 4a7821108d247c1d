"""docs/change_the_recipe.md: each change is applied to the recipe, trained with, and does what the page says."""

import functools
import importlib.util
import re
import signal
from pathlib import Path

import pytest
import torch
from helpers_road import LORA, read_rows, road, train
from PIL import Image
from safetensors.torch import load_file

from mochi_tune.adapters.files import load_adapter
from mochi_tune.adapters.lora import all_linear_shapes, linear_shapes, select_layers
from mochi_tune.cli.main import main
from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.errors import CheckpointError, TrainingError
from mochi_tune.recipes.replay import main as replay
from mochi_tune.weights.folder import WeightsFolder

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "change_the_recipe.md").read_text()
STEPS = ["train.steps=3", "train.warmup_steps=0", "train.learning_rate=1e-2"]


def changed_recipe(tmp_path: Path, title: str, **replaced: str):
    """Applies the diffs of a section to the recipe and imports the result."""
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    recipe = (ROOT / "recipes" / "train_lora.py").read_text()
    diffs = re.findall(r"```diff\n(.*?)```", section, re.DOTALL)
    assert diffs
    for diff in diffs:
        lines = diff.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert recipe.count(before) == 1, before
        recipe = recipe.replace(before, after)
    for old, new in replaced.items():
        assert old in recipe
        recipe = recipe.replace(old, new)
    path = tmp_path / "my_recipe.py"
    path.write_text(recipe)
    spec = importlib.util.spec_from_file_location("my_recipe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("plain")
    assert train(run_dir, *STEPS) == 0
    return run_dir


def train_changed(recipe, run_dir: Path, *more: str) -> list[dict]:
    """Trains two steps, resumes for the third, and returns the rows."""
    for steps in ("train.steps=2", "train.steps=3"):
        assert recipe.main(load_config("my_lora", road(run_dir, *LORA, *STEPS, steps, *more))) == 0
    return read_rows(run_dir / "metrics.jsonl")


def test_another_loss(plain, tmp_path):
    rows, expected = train_changed(changed_recipe(tmp_path, "Another loss"), tmp_path / "run"), plain / "metrics.jsonl"
    assert [row["clips"] for row in rows] == [row["clips"] for row in read_rows(expected)]
    # Of an error e the Huber loss is at most e^2 / 2, and far from 0 it is much less.
    assert all(0 < row["loss"] < 0.5 * other["loss"] for row, other in zip(rows, read_rows(expected), strict=True))


def test_one_more_number_a_step(tmp_path):
    rows = train_changed(changed_recipe(tmp_path, "One more number a step"), tmp_path / "run")
    norms = read_rows(tmp_path / "run" / "weight_norm.jsonl")
    assert [row["step"] for row in norms] == [row["step"] for row in rows] == [1, 2, 3]
    adapter = load_file(tmp_path / "run" / "adapter.safetensors")
    weights = [tensor for name, tensor in adapter.items() if name.endswith((".lora_A", ".lora_B"))]
    norm = sum(tensor.double().square().sum() for tensor in weights).sqrt().item()
    # A norm of norms in fp32.
    assert norms[-1]["weight_norm"] == pytest.approx(norm, rel=1e-6)


def test_replay_refuses_a_step_of_other_layers(tmp_path):
    infinite = {"return loss.detach()": "return loss.detach() * torch.inf"}
    recipe = changed_recipe(tmp_path, "A frozen half of the layers", **infinite)
    with pytest.raises(TrainingError, match="replay"):
        recipe.main(load_config("my_lora", road(tmp_path / "run", *LORA, *STEPS)))
    [bundle] = (tmp_path / "run" / "bundles").iterdir()
    with pytest.raises(CheckpointError, match=r"\d+ parameters differ"):
        replay(bundle, "cpu")


def test_a_second_adapter_stays_frozen_under_the_one_that_is_trained(plain, tmp_path):
    style = plain / "adapter.safetensors"
    before = style.read_bytes()
    recipe = changed_recipe(tmp_path, "A second adapter", **{"style.safetensors": str(style)})
    shown = ["train.sample_every=9", "train.sample_prompts=[a cat]", "sample.steps=1", "sample.num_frames=1"]
    rows = train_changed(recipe, tmp_path / "run", *shown)
    assert rows[0]["loss"] != read_rows(plain / "metrics.jsonl")[0]["loss"], "the first adapter plays its part"
    with Image.open(tmp_path / "run" / "samples" / "step_000000_prompt_0.png") as picture:
        halves = [picture.crop((x, 0, x + picture.width // 2, picture.height)) for x in (0, picture.width // 2)]
    assert halves[0].tobytes() != halves[1].tobytes(), "and is seen on the right before the second one has learnt"
    adapter, other = load_file(tmp_path / "run" / "adapter.safetensors"), load_file(style)
    assert adapter.keys() == other.keys() and style.read_bytes() == before
    assert any(not torch.equal(adapter[name], other[name]) for name in adapter)


def test_a_second_adapter_of_the_embedders_plays_its_part(plain, tmp_path):
    from mochi_tune.adapters.files import Adapter, LoraLayer, save_adapter

    skeleton = WeightsFolder(weights_folder(load_config("my_lora", ["model=tiny"]))).dit_skeleton()
    out, wide = all_linear_shapes(skeleton)["t_embedder.mlp.0"]
    layer = LoraLayer(torch.full((1, wide), 0.1), torch.ones(out, 1), 1.0)
    save_adapter(tmp_path / "style.safetensors", Adapter({"t_embedder.mlp.0": layer}, {}))
    style = {"style.safetensors": str(tmp_path / "style.safetensors")}
    rows = train_changed(changed_recipe(tmp_path, "A second adapter", **style), tmp_path / "run")
    assert rows[0]["loss"] != read_rows(plain / "metrics.jsonl")[0]["loss"]


def test_a_frozen_half_of_the_layers(tmp_path):
    recipe = changed_recipe(tmp_path, "A frozen half of the layers")
    train_changed(recipe, tmp_path / "run")
    skeleton = WeightsFolder(weights_folder(load_config("my_lora", ["model=tiny"]))).dit_skeleton()
    trained = {int(name.split(".")[1]) for name in load_adapter(tmp_path / "run" / "adapter.safetensors").layers}
    assert trained == set(range(skeleton.config.depth // 2, skeleton.config.depth))


def test_the_pattern_for_half_of_the_layers_is_the_second_half_of_mochi():
    [pattern] = re.findall(r"lora\.targets=\['(.*?)'\]", PAGE)
    names = [f"blocks.{i}.attn.qkv_x" for i in range(48)]
    assert select_layers(names, [pattern]) == names[24:]
    tiny = WeightsFolder(weights_folder(load_config("my_lora", ["model=tiny"]))).dit_skeleton()
    assert "blocks.0.attn.qkv_x" in linear_shapes(tiny), "the names are those of the model"


def test_a_recipe_of_ones_own_is_run_as_the_command_runs_its_own(tmp_path, capsys, request):
    calls = []

    def recipe(config, num_processes: int) -> int:
        calls.append((config.train.steps, num_processes))
        return 0

    arguments = ["train", "conf=my_lora", *road(tmp_path, "train.steps=3")]
    # The command ignores it from its start on.
    request.addfinalizer(functools.partial(signal.signal, signal.SIGUSR1, signal.getsignal(signal.SIGUSR1)))
    for more, code in (([], 0), (["train.stesp=3"], 2), (["parallel.num_processes=2"], 2)):
        with pytest.raises(SystemExit) as end:
            main([*arguments, *more], recipe)
        assert end.value.code == code
    typo, processes = capsys.readouterr().err.splitlines()
    assert "did you mean train.steps?" in typo and "start a custom recipe by torchrun" in processes
    assert calls == [(3, 1)]
