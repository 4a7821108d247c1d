"""Training on clips of several sizes, with several captions, and on data that changes between two runs."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers_process import Disturbance, run, run_in_two, run_program
from helpers_road import LORA, QUIET, read_rows
from helpers_video import write_video
from safetensors.torch import load_file

from mochi_tune.config.load import load_config
from mochi_tune.config.sources import buckets_by_source
from mochi_tune.data.cache import open_cache
from mochi_tune.data.dataset import LatentDataset
from mochi_tune.data_prep import changes
from mochi_tune.data_prep.prepare import main as prepare
from mochi_tune.errors import DataError, TrainingError
from mochi_tune.recipes.train_lora import main
from mochi_tune.training.draws import KeyedDraws
from mochi_tune.training.loader import ClipLoader, describe_held_out, held_out, spread
from mochi_tune.training.preflight import check

BUCKETS = "data.buckets=[[7,32,48],[13,32,48],[7,48,32]]"
NO_DROPOUT = [setting for setting in LORA if "dropout" not in setting]
STEPS = ["train.steps=8", "train.schedule=constant", "train.warmup_steps=0", "train.caption_dropout=0.25"]


def settings(folder: Path, run_dir: Path, *more: str) -> list[str]:
    paths = [f"data.videos={folder / 'videos'}", f"data.cache={folder / 'cache'}", f"run_dir={run_dir}"]
    return ["model=tiny", "device=cpu", BUCKETS, "data.captions=lines", *QUIET, *NO_DROPOUT, *STEPS, *paths, *more]


def train(folder: Path, run_dir: Path, *more: str) -> int:
    return main(load_config("my_lora", settings(folder, run_dir, *more)))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two wide clips, a long one and two tall ones; one has three captions."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "videos").mkdir()
    clips = {"wide_0": (8, 48, 32), "wide_1": (9, 48, 32), "long": (14, 48, 32), "tall_0": (8, 32, 48)}
    for number, (name, (num_frames, width, height)) in enumerate((clips | {"tall_1": (7, 32, 48)}).items()):
        path = folder / "videos" / f"{name}.mp4"
        write_video(path, num_frames, width=width, height=height, first_number=20 * number)
        lines = ["a", "the same clip", "it has three captions"] if name == "long" else [f"a clip, {name}"]
        path.with_suffix(".txt").write_text("\n".join(lines))
    assert prepare(load_config("my_lora", settings(folder, folder / "run"))) == 0
    return folder


@pytest.fixture
def mixed(made, tmp_path) -> Path:
    """The same, to be changed."""
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def straight(made, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight")
    assert train(made, run_dir, "train.batch_size=1", "train.accumulation_steps=2") == 0
    return run_dir


def test_all_sizes_are_trained_on_equally_often(straight):
    drawn = [clip for row in read_rows(straight / "metrics.jsonl") for clip in row["clips"]]
    assert len(drawn) == 16
    for epoch in range(3):
        assert len(set(drawn[5 * epoch : 5 * epoch + 5])) == 5


def test_a_batch_has_clips_of_one_size(made, tmp_path):
    assert train(made, tmp_path, "train.batch_size=2") == 0
    sizes = {row.sample_id: row.bucket for row in open_cache(made / "cache", _buckets()).rows}
    for row in read_rows(tmp_path / "metrics.jsonl"):
        assert len(row["clips"]) == 2 and len({sizes[clip] for clip in row["clips"]}) == 1


def _buckets():
    return buckets_by_source(load_config("my_lora", ["model=tiny", BUCKETS]).data)


def test_a_resumed_run_is_the_straight_one_bit_for_bit(made, straight, tmp_path):
    more = ["train.batch_size=1", "train.accumulation_steps=2"]
    assert train(made, tmp_path, *more, "train.steps=3") == 0
    assert train(made, tmp_path, *more) == 0
    ours, theirs = (read_rows(folder / "metrics.jsonl") for folder in (tmp_path, straight))
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]
    ours, theirs = (load_file(folder / "adapter.safetensors") for folder in (tmp_path, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_killed_run_is_the_straight_one_bit_for_bit(made, straight, tmp_path):
    """By SIGKILL in the save of its sixth step; the steps since the one before are made again."""
    run_dir = tmp_path / "run"
    more = ["train.batch_size=1", "train.accumulation_steps=2", "train.checkpoint_every=2"]
    kill = Disturbance(run_dir, signal_before=".tmp_000006")
    code, out = run_program(["train", "conf=my_lora", *settings(made, run_dir, *more)], tmp_path / "log", kill)
    assert code == -signal.SIGKILL, out[-2000:]
    code, out = run_program(["train", "conf=my_lora", *settings(made, run_dir, *more)], tmp_path / "log")
    assert code == 0 and "from step 4" in out, out[-2000:]
    ours, theirs = (read_rows(folder / "metrics.jsonl") for folder in (run_dir, straight))
    assert [(row["clips"], row["loss"]) for row in ours] == [(row["clips"], row["loss"]) for row in theirs]
    ours, theirs = (load_file(folder / "adapter.safetensors") for folder in (run_dir, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "layout",
    [
        ["train.accumulation_steps=1", "parallel=data"],
        ["train.accumulation_steps=2", "parallel=context"],
        ["train.accumulation_steps=1", "parallel=zero2"],
    ],
    ids=lambda layout: layout[1],
)
def test_two_processes_make_the_run_of_one(made, straight, tmp_path, layout):
    more = [*settings(made, tmp_path), "train.batch_size=1", *layout, "parallel.num_processes=2"]
    done = run_in_two("train", "conf=my_lora", *more)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (read_rows(folder / "metrics.jsonl") for folder in (tmp_path, straight))
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine["clips"], mine["sigmas"]) == (its["clips"], its["sigmas"])
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-5)


def test_each_captions_turn_is_keyed_by_the_sample(made):
    dataset = LatentDataset(open_cache(made / "cache", _buckets()))
    place = next(i for i, row in enumerate(dataset.cache.rows) if row.sample_id == "long.mp4")
    assert dataset.cache.rows[place].captions == ("a", "the same clip", "it has three captions")
    draws = KeyedDraws(0, 1, 1, 0.0, False)
    config = load_config("my_lora", settings(made, made / "run"))
    loader = ClipLoader(dataset, check(config, 1).order, draws, True, print)
    seen = set()
    for step in range(1, 60):
        batch, _ = loader.load(step, 0)
        [name] = batch["sample_ids"]
        if name == "long.mp4":
            number = draws.caption(step, 0, 3)
            assert torch.equal(batch["prompt_embeds"][0], dataset.load(place, number)["prompt_embeds"])
            seen.add(number)
    assert seen == {0, 1, 2}
    assert draws.caption(7, 0, 1) == 0


def test_a_damaged_clip_is_replaced_by_one_of_its_size(mixed, tmp_path):
    [shard] = (mixed / "cache" / "data").iterdir()
    rows = json.loads((mixed / "cache" / "manifest.json").read_text())["shards"][0]["rows"]
    place = next(i for i, row in enumerate(rows) if row["sample_id"] == "tall_0.mp4")
    _break_latents(shard, place)
    assert train(mixed, tmp_path, "data.damaged=quarantine", "train.accumulation_steps=2", "train.steps=10") == 0
    drawn = [clip for row in read_rows(tmp_path / "metrics.jsonl") for clip in row["clips"]]
    assert "tall_0.mp4" not in drawn and drawn.count("tall_1.mp4") == 8


def test_a_size_without_a_whole_clip_ends_the_run(mixed, tmp_path):
    [shard] = (mixed / "cache" / "data").iterdir()
    rows = json.loads((mixed / "cache" / "manifest.json").read_text())["shards"][0]["rows"]
    _break_latents(shard, next(i for i, row in enumerate(rows) if row["sample_id"] == "long.mp4"))
    with pytest.raises(DataError, match="1 of 5 clips are damaged"):
        train(mixed, tmp_path, "data.damaged=quarantine", "train.accumulation_steps=2")


def test_settings_of_the_cut_and_the_captions_are_those_of_the_cache(mixed, tmp_path):
    for own in ("data.clips=all", "data.caption_prefix=TOK", "data.captions=one", "data.frame_rate=retime"):
        name, value = own.split("=")
        with pytest.raises(DataError, match=f"made with other settings.*{name}: .* the config wants {value}"):
            train(mixed, tmp_path, own)
    manifest = mixed / "cache" / "manifest.json"
    written = json.loads(manifest.read_text())
    del written["settings"]["transform"]["settings"]
    manifest.write_text(json.dumps(written))
    check(load_config("my_lora", settings(mixed, tmp_path, "data.clips=all")), 1)  # By a version that kept no note.


def _break_latents(shard: Path, place: int) -> None:
    import pyarrow.parquet as pq

    data = bytearray(shard.read_bytes())
    with pq.ParquetFile(shard) as file:
        column = file.metadata.row_group(place).column(file.schema_arrow.names.index("logvar"))
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    shard.write_bytes(data)


def test_another_caption_needs_no_force_and_is_told(mixed, tmp_path, capsys):
    assert train(mixed, tmp_path, "train.steps=2") == 0
    assert "have changed since" not in capsys.readouterr().out
    (mixed / "videos" / "wide_0.txt").write_text("other words")
    assert train(mixed, tmp_path, "train.steps=3") == 0
    assert "captions of 1 video have changed since `prepare` (wide_0.mp4)" in capsys.readouterr().out
    assert prepare(load_config("my_lora", settings(mixed, tmp_path))) == 0
    capsys.readouterr()
    assert train(mixed, tmp_path, "train.steps=4") == 0
    out = capsys.readouterr().out
    assert "have changed since `prepare`" not in out
    assert "since step 3: other captions or cuts of 1 clip (wide_0.mp4); their order is the same" in out
    (mixed / "videos" / "wide_1.mp4").unlink()
    write_video(mixed / "videos" / "tall_0.mp4", 8, width=32, height=48, first_number=170)
    write_video(mixed / "videos" / "later@2.mp4", 8, width=48, height=32, first_number=80)
    (mixed / "videos" / "later@2.txt").write_text("a later one")
    assert train(mixed, tmp_path, "train.steps=5") == 0
    out = capsys.readouterr().out
    assert "1 video of the cache is no longer in the folder (wide_1.mp4)" in out
    assert "1 file has been added to the folder since `prepare` (later@2.mp4), and this run does not train on it" in out
    assert "1 video has been replaced since `prepare` (tall_0.mp4), and this run trains on the old" in out


def test_a_new_clip_of_a_name_that_another_folder_has_is_told(mixed, tmp_path, capsys):
    for folder in ("a", "b"):
        (mixed / "videos" / folder).mkdir()
        for suffix in (".mp4", ".txt"):
            shutil.copy(mixed / "videos" / f"wide_0{suffix}", mixed / "videos" / folder / f"wide_0{suffix}")
    assert train(mixed, tmp_path, "train.steps=1") == 0
    assert "2 files have been added to the folder since `prepare` (wide_0.mp4, wide_0.mp4)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbfclip;status\nwide_0.mp4;kept\n", b"clip,status\nw\xe9.mp4,kept\n", b"status,clip\nkept\n"]
)
def test_a_report_that_another_program_has_saved_stops_no_training(mixed, tmp_path, capsys, content):
    (mixed / "cache" / "report.csv").write_bytes(content)
    (mixed / "videos" / "wide_0.mp4").unlink()
    (mixed / "videos" / "wide_0.mp4").mkdir()
    assert train(mixed, tmp_path, "train.steps=1") == 0
    assert "cannot check whether" in capsys.readouterr().out


def test_what_cannot_be_read_quickly_is_not_read(mixed, tmp_path, monkeypatch, capsys):
    write_video(mixed / "videos" / "tall_0.mp4", 8, width=32, height=48, first_number=170)
    monkeypatch.setattr(changes, "MAX_BYTES", 0)
    assert train(mixed, tmp_path, "train.steps=1") == 0
    assert "been replaced" not in capsys.readouterr().out


def test_a_clip_that_was_refused_is_no_new_one(mixed, tmp_path, capsys):
    (mixed / "videos" / "broken.mp4").write_bytes(b"no video")
    (mixed / "videos" / "broken.txt").write_text("a broken one")
    assert prepare(load_config("my_lora", settings(mixed, tmp_path))) == 1
    capsys.readouterr()
    assert train(mixed, tmp_path, "train.steps=1") == 0
    assert "since `prepare`" not in capsys.readouterr().out


@pytest.mark.parametrize("change", ["grown", "shrunk", "batch"])
def test_what_changes_the_order_asks_for_force_and_says_what(mixed, tmp_path, change, capsys):
    assert train(mixed, tmp_path, "train.steps=2", "train.batch_size=2") == 0
    more, what = ["train.batch_size=2"], "or the batch size changed"
    if change == "grown":
        write_video(mixed / "videos" / "new.mp4", 8, width=48, height=32, first_number=99)
        (mixed / "videos" / "new.txt").write_text("a new one")
        what = r"1 new \(new.mp4\)"
    elif change == "shrunk":
        (mixed / "videos" / "wide_0.mp4").unlink()
        what = r"1 removed \(wide_0.mp4\)"
    else:
        # The same samples a step, in other groups: a batch has one size.
        more = ["train.batch_size=1", "train.accumulation_steps=2"]
    prepare(load_config("my_lora", settings(mixed, tmp_path)))
    with pytest.raises(TrainingError, match=f"differs from that of the first 2 steps.*{what}.*resume=force"):
        train(mixed, tmp_path, "train.steps=4", *more)
    assert train(mixed, tmp_path, "train.steps=4", *more, "resume=force") == 0
    # Once it was forced, the same command goes on, also if it was killed before its first checkpoint.
    shutil.rmtree(tmp_path / "checkpoints" / "step_000004")
    assert train(mixed, tmp_path, "train.steps=4", *more) == 0
    assert train(mixed, tmp_path, "train.steps=5", *more) == 0
    if change == "grown":  # Past the change, the clips of the last start do not name it.
        back = f"resume_from={tmp_path / 'checkpoints/step_000002'}"
        with pytest.raises(TrainingError, match=r"first 2 steps: the seed changed, clips were added, removed or enc"):
            train(mixed, tmp_path, "train.steps=6", *more, back, "seed=7")


def test_clips_of_one_video_are_held_out_together():
    videos = ["a"] * 3 + ["b"] * 2 + ["c"] + ["d"] * 4
    for seed in range(20):
        held = held_out(videos, 2, seed)
        assert len(held) <= 2
        for name in "abcd":
            members = {i for i, video in enumerate(videos) if video == name}
            assert members <= set(held) or not members & set(held)
    assert any(held_out(videos, 2, seed) == [3, 4] for seed in range(20))
    # Where each video has more clips than are wanted, the one with the fewest is held out, and some of it measured.
    many = ["a"] * 10 + ["b"] * 6 + ["c"] * 10 + ["d"] * 10
    assert held_out(many, 4, 0) == [*range(10, 16)] and spread(range(10, 16), 4) == [10, 11, 13, 14]
    assert describe_held_out(6, 4, 36).endswith("6 of 36 clips; 4 of them are measured")
    assert held_out(many, 0, 0) == held_out(many[:10], 4, 0) == held_out([], 4, 0) == [] and spread([], 4) == []


def test_sources_are_drawn_by_their_repeats(tmp_path):
    for name, count in (("cats", 2), ("dogs", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            write_video(tmp_path / name / f"{number}.mp4", 7, width=48, height=32, first_number=10 * number + count)
            (tmp_path / name / f"{number}.txt").write_text(f"{name} {number}")
    sources = f"data.sources=[{{folder: {tmp_path / 'cats'}}}, {{folder: {tmp_path / 'dogs'}, repeats: 4}}]"
    more = [sources, "train.steps=12"]
    assert prepare(load_config("my_lora", settings(tmp_path, tmp_path / "run", *more))) == 0
    assert train(tmp_path, tmp_path / "run", *more) == 0
    drawn = [clip for row in read_rows(tmp_path / "run" / "metrics.jsonl") for clip in row["clips"]]
    for epoch in (drawn[:6], drawn[6:]):
        assert sorted(epoch) == ["cats/0.mp4", "cats/1.mp4"] + ["dogs/0.mp4"] * 4


def test_a_source_of_validation_is_measured_and_never_trained_on(tmp_path, capsys):
    for number, name in enumerate(("cats", "dogs")):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "0.mp4", 14, width=48, height=32, first_number=20 * number)
        (tmp_path / name / "0.txt").write_text(name)
    # One folder at two sizes.
    twice = f"{{folder: {tmp_path / 'cats'}}}, {{folder: {tmp_path / 'cats'}, name: long, buckets: [[13,32,48]]}}"
    dogs, more = f"folder: {tmp_path / 'dogs'}", ["train.validate_every=2"]
    sources = f"data.sources=[{twice}, {{{dogs}, validation: true}}]"
    assert prepare(load_config("my_lora", settings(tmp_path, tmp_path / "run", sources))) == 0
    assert "held out for validation, never trained on: 1 clip of dogs" in capsys.readouterr().out
    assert train(tmp_path, tmp_path / "run", sources, "train.steps=2", *more) == 0
    assert "held out for validation: 1 of 3 clips" in capsys.readouterr().out
    drawn = [clip for row in read_rows(tmp_path / "run" / "metrics.jsonl") for clip in row["clips"]]
    assert sorted(drawn) == ["cats/0.mp4", "long/0.mp4"]
    assert all(row["held_out"] for row in read_rows(tmp_path / "run" / "validation.jsonl"))
    assert "3, 1 of them held out for validation" in (tmp_path / "run" / "report.html").read_text()
    # The cache is the same, but what is trained on is not.
    with pytest.raises(TrainingError, match=r"held_out was 1, is 0.*order of the clips differs"):
        train(tmp_path, tmp_path / "run", f"data.sources=[{twice}, {{{dogs}}}]", "train.steps=4", *more)


def test_the_command_line_prepares_and_trains_several_sizes(tmp_path, made):
    shutil.copytree(made / "videos", tmp_path / "videos")
    for verb in ("prepare", "train"):
        done = run(verb, "conf=my_lora", *settings(tmp_path, tmp_path / "run"), "train.steps=2")
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "adapter.safetensors").is_file()
