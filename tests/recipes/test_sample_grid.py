import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_prepare import TINY
from helpers_process import run, run_in_two
from helpers_renders import write_adapter, write_dora
from helpers_road import road, train
from PIL import Image
from safetensors.torch import load_file, save_file

from mochi_tune.adapters.files import LoraLayer, load_adapter, save_adapter
from mochi_tune.config.load import load_config
from mochi_tune.errors import ConfigError
from mochi_tune.recipes import sample_grid
from mochi_tune.recipes.sample import main as sample
from mochi_tune.recipes.sample_grid import main as grid
from mochi_tune.sampling.grid_video import MAX_HEIGHT, MAX_WIDTH, Row, frames_of, is_legible, write_grid_video
from mochi_tune.sampling.video import read_frames, write_video
from mochi_tune.weights.folder import WeightsFolder

FAST = ["sample.steps=2", "sample.guidance=2"]


def config(run_dir, *more):
    return load_config("my_lora", road(run_dir, *FAST, *more))


def render(run_dir, *more):
    """Renders a grid; returns its cells and the folder."""
    *cells, video, page = grid(config(run_dir, "sample.grid=true", *more))
    assert page.name == "index.html" and video.parent == page.parent
    return cells, page.parent


def single(run_dir, *more):
    [video] = sample(config(run_dir, "sample.save_latents=true", *more))
    return load_file(video.with_suffix(".safetensors"))["latents"]


def latents_by(cells, key):
    """Returns the latents of cells by something of their settings."""
    records = {cell: json.loads(cell.with_suffix(".json").read_text()) for cell in cells}
    return {key(record): load_file(cell.with_suffix(".safetensors"))["latents"] for cell, record in records.items()}


def with_modulation(path):
    """Adds a layer of modulation, whose weights stay in host memory, to a DoRA."""
    adapter, name = load_adapter(path), "blocks.0.mod_x"
    weight = load_file(TINY / "dit.safetensors")[f"{name}.weight"].float()
    a, b = (
        torch.randn(size, generator=torch.Generator().manual_seed(5))
        for size in ((2, weight.shape[1]), (len(weight), 2))
    )
    adapter.layers[name] = LoraLayer(a, b / 8, 2.0, 1.3 * weight.norm(dim=1))
    save_adapter(path, adapter)
    return path


def test_a_cell_is_what_sample_renders_with_the_same_settings(tmp_path):
    plain = write_adapter(tmp_path / "a.safetensors", 1, 0.3)
    dora = with_modulation(write_dora(tmp_path / "d.safetensors", 2))
    common = [f"sample.adapter=[{plain},{dora}]", "sample.prompt=a red ball"]
    more = ["sample.adapter_strength=[1,0.7]", "sample.strengths=[0.5,0,1]", "sample.seeds=[4]"]
    cells, _ = render(tmp_path, *common, *more, "sample.save_latents=true")
    found = latents_by(cells, lambda r: (r["seed"], *(a["strength"] for a in r["adapters"])))
    assert found.keys() == {(4, 0.5, 0.35), (4,), (4, 1, 0.7)}
    assert not torch.allclose(found[4, 1, 0.7], found[4, 0.5, 0.35], atol=1e-3)
    record = json.loads(cells[0].with_suffix(".json").read_text())
    assert record["weights"].keys() == {"text_encoder", "dit", "decoder"}
    for strengths in ("[0.5,0.35]", "[0,0]", "[1,0.7]"):
        key = tuple(json.loads(strengths)) if strengths != "[0,0]" else ()
        alone = single(tmp_path, *common, f"sample.adapter_strength={strengths}", "seed=4")
        assert torch.equal(found[4, *key], alone), strengths


def test_checkpoints_of_a_run_stand_side_by_side(tmp_path, monkeypatch):
    more = ["train.steps=2", "train.checkpoint_every=1", "train.learning_rate=0.1"]
    assert train(tmp_path, *more) == 0
    common = ["sample.prompt=a cat", "sample.strengths=[0,1]"]
    checks, check = [], WeightsFolder.check
    monkeypatch.setattr(WeightsFolder, "check", lambda *arguments: checks.append(1) or check(*arguments))
    cells, folder = render(tmp_path, *common, "sample.checkpoints=all", "sample.save_latents=true")
    assert len(checks) == 1
    # Strength 0 is the base, whatever the checkpoint.
    assert len(cells) == 3 and folder.parent == tmp_path / "grids"
    page = (folder / "index.html").read_text()
    assert page.count("<video") == 4 and "step 1" in page and "step 2" in page and "strength 0" in page
    assert '<div class="scroll" tabindex="0" role="region" aria-label="a cat">' in page and "<th></th>" not in page
    found = latents_by(cells, lambda r: Path(r["adapters"][0]["file"]).parent.name if r["adapters"] else "base")
    for step in (1, 2):
        file = tmp_path / "checkpoints" / f"step_00000{step}" / "adapter.safetensors"
        alone = single(tmp_path, "sample.prompt=a cat", f"sample.adapter={file}")
        assert torch.equal(found[file.parent.name], alone)
    assert not torch.equal(found["step_000001"], found["step_000002"])
    with pytest.raises(ConfigError, match=r"checkpoints: 7 is not in .*, which has those of steps 1, 2"):
        render(tmp_path, *common, "sample.checkpoints=[7]")


def test_what_is_there_is_kept_and_only_the_rest_is_made(tmp_path):
    adapter = write_adapter(tmp_path / "a.safetensors", scale=0.3)
    more = [
        f"sample.adapter={adapter}",
        "sample.prompt=a cat",
        "sample.strengths=[0,1]",
        f"sample.out={tmp_path / 'g'}",
    ]
    cells, folder = render(tmp_path, *more)
    before = {cell: cell.read_bytes() for cell in cells}
    assert folder == tmp_path / "g" and not list(folder.glob("cells/*.safetensors"))
    assert render(tmp_path, *more) == ([], folder)
    cells[1].unlink()
    assert render(tmp_path, *more) == (cells[1:], folder)
    assert {cell: cell.read_bytes() for cell in cells} == before
    # Another setting is another cell.
    assert len(render(tmp_path, *more, "sample.guidance=3")[0]) == 2
    # Settings are written last: a cell without them was not finished.
    cells[0].with_suffix(".json").unlink()
    assert render(tmp_path, *more) == (cells[:1], folder)


def test_the_page_needs_nothing_from_elsewhere_and_says_what_is_where(tmp_path):
    (tmp_path / "p.txt").write_text("a <b>red</b> ball\na cat\n")
    more = [f"sample.prompts={tmp_path / 'p.txt'}", "sample.seeds=[1,2]"]
    cells, folder = render(tmp_path, *more)
    page = (folder / "index.html").read_text()
    sources = re.findall(r'<video[^>]* src="([^"]*)"', page)
    assert sorted(folder / source for source in sources) == sorted(cells) and len(cells) == 4
    assert "http" not in page and "a &lt;b&gt;red&lt;/b&gt; ball" in page and "<b>red" not in page
    assert re.findall(r'<th scope="col">([^<]*)', page) == ["seed 1", "seed 2"] * 2
    assert "prefers-color-scheme:dark" in page and 'name="viewport"' in page
    frames = read_frames(folder / "grid.mp4")
    assert len(frames) == 7


def test_rows_of_a_file_may_differ_in_size_and_settings(tmp_path, monkeypatch):
    calls, settings_of = [], sample_grid._settings_of
    monkeypatch.setattr(sample_grid, "_settings_of", lambda request: calls.append(1) or settings_of(request))
    rows = [{"prompt": "a", "height": 48}, {"prompt": "a", "num_frames": 13}, {"prompt": "b", "steps": 1, "seed": 9}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cells, folder = render(tmp_path, f"sample.prompts={tmp_path / 'p.jsonl'}", "sample.seeds=[1,2]")
    page = (folder / "index.html").read_text()
    labels = re.findall(r'<th scope="row">([^<]*)', page)
    assert len(cells) == page.count("<video") == 5 and len(read_frames(folder / "grid.mp4")) == 13
    assert labels == [
        "7 frames of 48x48, settings 1",
        "13 frames of 32x48, settings 2",
        "7 frames of 32x48, settings 3",
    ]
    # The labels of a cell do not take the settings of all others again.
    assert len(calls) == len(cells)
    # Seed 9 is of the last row alone.
    assert re.findall(r'<th scope="col">([^<]*)', page) == ["seed 1", "seed 2", "seed 9"] * 2


def test_stills_are_one_picture(tmp_path):
    cells, folder = render(tmp_path, "sample.prompt=a cat", "sample.seeds=[1,2]", "sample.num_frames=1")
    assert all(cell.suffix == ".png" for cell in cells) and (folder / "grid.png").exists()
    whole = np.array(Image.open(folder / "grid.png"))
    assert all((np.array(Image.open(cell))[0, 0] == whole).all(-1).any() for cell in cells)
    assert (folder / "index.html").read_text().count("<img") == 2


def solid(path, level, count, size=(32, 48)):
    return write_video(path, [torch.full((count, *size, 3), level, dtype=torch.uint8)])


def test_the_tiles_of_the_video_stand_in_rows_and_columns_and_the_shorter_wait(tmp_path):
    dark, light = solid(tmp_path / "d.mp4", 90, 3), solid(tmp_path / "l.mp4", 220, 1)
    rows = [Row("first\nrow", [dark, light]), Row("second", [None, dark])]
    frames = [np.array(frame) for frame in frames_of(write_grid_video(tmp_path, rows, ["x", "y"]))]
    assert len(frames) == 3
    # The label is 120 wide, a column 48 and a gap of 8; the header is 44 high, a row 32 and a gap of 8.
    for frame in frames:
        centres = [[frame[44 + 40 * r + 16, 120 + 56 * c + 24].mean() for c in (0, 1)] for r in (0, 1)]
        assert np.abs(np.array(centres) - [[90, 220], [23, 90]]).max() <= 3
    large = solid(tmp_path / "large.mp4", 90, 1, (480, 848))
    written = write_grid_video(tmp_path, [Row("row", [large] * 7)] * 6, list("abcdefg"))
    width, height = Image.open(written).size
    assert 0.8 * MAX_HEIGHT < height <= MAX_HEIGHT and width <= MAX_WIDTH


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["sample.compare=base"],
            r"grid=true compares by strengths=\[0,1\], with 0 for the base: leave out sample\.compare\.$",
        ),
        (["sample.compile=true"], r"grid=true does not compile the model: leave out sample\.compile\.$"),
        (["parallel.num_processes=2"], r"renders each video in one process: leave out parallel\.num_processes\.$"),
        (["sample.out=x.mp4"], r"out=x\.mp4 is a file, and sample\.grid=true fills a folder"),
        (["sample.out=x.gif"], r"out=x\.gif is a file"),
        (["sample.format=gif"], r"sample\.format=gif is not for a grid: use mp4 or webm"),
        (["sample.strengths=[0,1]"], r"strengths=\[0\.0, 1\.0\] has no adapter"),
        (["sample.checkpoints=all"], r"checkpoints: all is not in .*, which has none"),
        (["sample.checkpoints=[1]", "sample.adapter=a"], "names others: leave one out"),
    ],
)
def test_what_cannot_be_a_grid_is_refused(tmp_path, settings, said):
    with pytest.raises(ConfigError, match=said):
        render(tmp_path, "sample.prompt=a cat", *settings)


def test_a_grid_that_a_launcher_started_as_two_processes_is_refused(tmp_path):
    done = run_in_two("sample", "conf=my_lora", *road(tmp_path, *FAST), "prompt=a cat", "adapter=none", "grid=true")
    said = (
        "sample.grid=true runs as one process, and 2 were started together: start it as one process, or start several"
    )
    assert done.returncode == 2 and said in done.stderr and "leave out" not in done.stderr, done.stderr


def test_the_command_prints_what_it_writes_and_an_axis_asks_for_the_grid(tmp_path):
    arguments = ["sample", "conf=my_lora", *road(tmp_path, *FAST), "prompt=a cat", "adapter=none"]
    done = run(*arguments, "grid=true", "seeds=[1,2]", f"out={tmp_path / 'g'}")
    assert done.returncode == 0, done.stderr
    assert [Path(line).suffix for line in done.stdout.splitlines()] == [".mp4", ".mp4", ".mp4", ".html"]
    done = run(*arguments, "strengths=[0,1]")
    said = (
        "sample.strengths is an axis of a grid: add grid=true, or parallel.shard= or parallel.engine=ray for its videos"
    )
    assert done.returncode == 2 and done.stderr == f"mochi-tune: {said} alone.\n"


def test_a_share_without_a_video_says_how_many_there_are(tmp_path, capsys):
    assert not list(grid(config(tmp_path, "sample.prompt=a cat", "sample.adapter=none", "parallel.shard=2/3")))
    assert "1 cell of 1 video, 0 in share 2/3, 0 done: " in capsys.readouterr().err


def test_a_cell_of_other_weights_or_another_precision_is_another_one(tmp_path):
    """A base that was tuned in its MLPs is another one, though its fingerprint for adapters is the same."""
    tuned = tmp_path / "tuned"
    shutil.copytree(TINY, tuned)
    tensors = load_file(tuned / "dit.safetensors")
    tensors["blocks.0.mlp_x.w2.weight"] = tensors["blocks.0.mlp_x.w2.weight"] * 2
    save_file(tensors, tuned / "dit.safetensors")
    out = f"sample.out={tmp_path / 'grid'}"
    names = [
        [path.name for path in render(tmp_path, "sample.prompt=a cat", out, *more)[0]]
        for more in (
            [],
            [f"model.weights={tuned}"],
            ["memory.dit=int8"],
            ["memory.t5_dtype=int8"],
            ["memory.dit=offload"],
        )
    ]
    # Where the weights are while it is rendered changes nothing: that one is there.
    assert len({name for [name] in names[:4]}) == 4 and names[4] == []


def test_a_grid_of_too_many_rows_or_columns_is_no_video():
    assert is_legible(55, 97) and not is_legible(56, 1) and not is_legible(1, 98)


def test_a_grid_of_too_many_videos_has_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_grid, "MOST_IN_A_VIDEO", 1)
    more = ["sample.grid=true", "sample.prompt=a cat", "sample.seeds=[0,1]"]
    *cells, page = grid(config(tmp_path, *more))
    assert len(cells) == 2 and page.name == "index.html" and page.read_text().count("<video") == 2
    assert not (page.parent / "grid.mp4").exists()
