import gc
import json
import os
import re
import shutil
import signal
import threading
import weakref
from pathlib import Path

import pytest
import torch
from helpers_cache import BUCKETS
from helpers_golden import TOLERANCE, relative_error
from helpers_prepare import GEOMETRY, TINY, add_clip, config_for, report_of
from helpers_process import Disturbance, run_program
from helpers_road import SIZES
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from mochi_tune.config.schema import MemoryConfig
from mochi_tune.data.cache import open_cache
from mochi_tune.data.cache_writer import CacheWriter
from mochi_tune.data_prep.clips import Cut, decode_clip
from mochi_tune.data_prep.encode import encode_frames
from mochi_tune.data_prep.prepare import Prepared, main, prepare
from mochi_tune.errors import CheckpointError, ConfigError, DataError
from mochi_tune.files import file_sha256
from mochi_tune.models.device import find_device
from mochi_tune.models.text_encoder import T5_DTYPES
from mochi_tune.models.vae import PointwiseConv, frames_to_pixels
from mochi_tune.weights.folder import WeightsFolder

LONG_CAPTION = "a red bird flies over the sea " * 50
CAPTIONS = {
    "bird.mp4": "a red bird flies",
    "copy.mp4": "a red bird flies",
    "mute.mp4": "",
    "sub/long.mp4": LONG_CAPTION,
}


def state(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(file.relative_to(folder)): (file_sha256(file), file.stat().st_mtime_ns)
        for file in sorted((folder / "cache").rglob("*"))
        if file.is_file() and file.name not in (".lock", ".files.json", "report.csv")
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Four good clips, two with the same bytes, and one that lacks a frame; prepared once."""
    folder = tmp_path_factory.mktemp("base")
    add_clip(folder, "bird.mp4", CAPTIONS["bird.mp4"])
    shutil.copy(folder / "videos" / "bird.mp4", folder / "videos" / "copy.mp4")
    (folder / "videos" / "copy.txt").write_text(CAPTIONS["copy.mp4"] + "\n")
    add_clip(folder, "mute.mp4", None, 10, first_number=40)
    add_clip(folder, "sub/long.mp4", LONG_CAPTION, 14, first_number=80, width=64, height=64)
    add_clip(folder, "short.mp4", "a cat", 6)
    assert main(config_for(folder)) == 1
    return folder


@pytest.fixture
def good(base, tmp_path):
    """A copy of the base without the refused clip."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    (tmp_path / "videos" / "short.mp4").unlink()
    return tmp_path


def test_the_cache_holds_what_the_models_make_of_each_clip(base):
    cache = open_cache(
        base / "cache",
        BUCKETS,
        vae_fingerprint=WeightsFolder(TINY).fingerprint("encoder"),
        t5_fingerprint=WeightsFolder(TINY).fingerprint("text_encoder"),
    )
    assert {row.path: row.captions[0] for row in cache.rows} == {name: text.strip() for name, text in CAPTIONS.items()}
    encoder = WeightsFolder(TINY).load_encoder("cpu", torch.float32)
    text_encoder = WeightsFolder(TINY).load_text_encoder("cpu", torch.float32)
    for index, row in enumerate(cache.rows):
        clip = decode_clip(base / "videos" / row.path, Cut(**GEOMETRY))
        mean, logvar = encoder(frames_to_pixels(clip.frames[None]))
        item = cache.read(index)
        assert relative_error(item["mean"], mean[0]) <= TOLERANCE
        assert relative_error(item["logvar"], logvar[0]) <= TOLERANCE
        assert torch.equal(item["prompt_embeds"], text_encoder.encode([row.captions[0]])[0])
    lengths = {row.path: len(cache.read(index)["prompt_embeds"]) for index, row in enumerate(cache.rows)}
    assert lengths == {"bird.mp4": 5, "copy.mp4": 5, "mute.mp4": 0, "sub/long.mp4": 256}


def test_every_input_has_a_row_in_the_report(base):
    report = report_of(base)
    assert list(report) == ["bird.mp4", "copy.mp4", "mute.mp4", "short.mp4", "sub/long.mp4"]
    assert {name: record["status"] for name, record in report.items()} == {
        "bird.mp4": "kept", "copy.mp4": "kept", "mute.mp4": "kept", "short.mp4": "refused", "sub/long.mp4": "kept",
    }  # fmt: skip
    assert "has 6" in report["short.mp4"]["reason"] and "needs 7" in report["short.mp4"]["reason"]
    assert report["short.mp4"]["caption"] == "a cat"
    bird, long = report["bird.mp4"], report["sub/long.mp4"]
    assert (bird["reason"], bird["caption"], bird["caption_tokens"], bird["lost_tokens"]) == (
        "",
        "a red bird flies",
        "5",
        "0",
    )
    assert (bird["source_width"], bird["source_height"], bird["source_frames"]) == ("96", "72", "7")
    # 96x72 is scaled to 48x36, and 2 rows are cropped at the top and bottom: 4 rows of the source.
    assert (float(bird["scale"]), json.loads(bird["crop"]), float(bird["start_seconds"])) == (0.5, [0, 4, 96, 64], 0)
    assert (long["caption_tokens"], long["lost_tokens"]) == ("351", "95")
    assert (report["mute.mp4"]["caption"], report["mute.mp4"]["caption_tokens"]) == ("", "0")


def test_a_second_run_encodes_and_writes_nothing_and_still_reports(base, tmp_path, capsys):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    before, report = state(tmp_path), (tmp_path / "cache" / "report.csv").read_bytes()
    assert main(config_for(tmp_path)) == 1
    assert state(tmp_path) == before
    assert (tmp_path / "cache" / "report.csv").read_bytes() == report.replace(bytes(base), bytes(tmp_path))
    out = capsys.readouterr().out
    assert "4 clips kept, 1 refused; encoded now: 0 clips and 0 captions, reused: 4 clips" in out
    assert "short.mp4: is too short" in out
    assert re.search(r"captions cut to 256 tokens: sub/long\.mp4 by 95 \('.{60}\.\.\.' is lost\)", out)
    row = report_of(tmp_path)["sub/long.mp4"]
    assert len(row["lost_text"].split()) == 95 and row["caption"].endswith(row["lost_text"])


def test_without_refused_clips_the_exit_code_is_0_and_a_moved_weights_folder_changes_nothing(good, capsys):
    shutil.copytree(TINY, good / "weights")
    assert main(config_for(good, good / "weights")) == 0
    assert "4 clips kept, 0 refused; encoded now: 0 clips and 0 captions" in capsys.readouterr().out


def test_a_changed_caption_encodes_that_caption_alone(good):
    before = open_cache(good / "cache", BUCKETS)
    old = {row.path: before.read(index) for index, row in enumerate(before.rows)}
    (good / "videos" / "copy.txt").write_text("a blue fish")
    done = prepare(config_for(good))
    assert done == Prepared(4, 0, 0, 1, done.cache_bytes, "4 in [7, 32, 48]") and 10_000 < done.cache_bytes < 1_000_000
    cache = open_cache(good / "cache", BUCKETS)
    assert [row.captions[0] for row in cache.rows] == ["a red bird flies", "a blue fish", "", LONG_CAPTION.strip()]
    for index, row in enumerate(cache.rows):
        item = cache.read(index)
        for name in ("mean", "logvar", "prompt_embeds"):
            assert torch.equal(item[name], old[row.path][name]) == ((row.path, name) != ("copy.mp4", "prompt_embeds"))
    expected = WeightsFolder(TINY).load_text_encoder("cpu", torch.float32).encode(["a blue fish"])[0]
    assert torch.equal(cache.read(1)["prompt_embeds"], expected)


def test_changed_removed_and_added_videos(good):
    (good / "videos" / "mute.mp4").unlink()
    add_clip(good, "bird.mp4", "a red bird flies", first_number=120)
    add_clip(good, "new.mp4", "a blue fish", first_number=160)
    done = prepare(config_for(good))
    assert (done.kept, done.refused, done.clips_encoded, done.captions_encoded) == (4, 0, 2, 1)
    cache = open_cache(good / "cache", BUCKETS)
    assert [row.path for row in cache.rows] == ["bird.mp4", "copy.mp4", "new.mp4", "sub/long.mp4"]
    assert not torch.equal(cache.read(0)["mean"], cache.read(1)["mean"])


def other_weights(folder: Path, file: str, change) -> Path:
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / file)
    for name, tensor in tensors.items():
        tensors[name] = change(name, tensor)
    save_file(tensors, folder / file, {"format": "pt"})
    return folder


def test_another_text_encoder_encodes_the_captions_alone(good):
    weights = other_weights(good / "weights", "text_encoder/model.safetensors", lambda _, tensor: tensor * 1.5)
    done = prepare(config_for(good, weights))
    assert (done.kept, done.clips_encoded, done.captions_encoded) == (4, 0, 3)


def test_a_text_encoder_that_gives_nan_stops_the_run_and_is_not_cached(good):
    weights = other_weights(
        good / "weights", "text_encoder/model.safetensors", lambda _, tensor: torch.full_like(tensor, float("nan"))
    )
    with pytest.raises(
        DataError, match=r"bird\.mp4: the features of its caption are not finite, and were not cached: T5"
    ):
        prepare(config_for(good, weights))
    assert not list((good / "cache").glob("parts/*"))


def test_an_encoder_that_gives_nan_stops_the_run_and_is_not_cached(good):
    weights = other_weights(
        good / "weights", "encoder.safetensors", lambda _, tensor: torch.full_like(tensor, float("nan"))
    )
    with pytest.raises(DataError, match=r"bird\.mp4: the latents are not finite, and were not cached"):
        prepare(config_for(good, weights))
    assert not list((good / "cache").glob("parts/*"))


def test_missing_captions_are_listed_before_any_weight_is_read(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        add_clip(tmp_path, name, {"a.mp4": "a cat", "b.mp4": "  \n", "c.mp4": None}[name], 1)
    with pytest.raises(DataError) as caught:
        prepare(config_for(tmp_path, tmp_path / "no_weights", allow_empty_captions=False))
    assert "(missing or empty): 2 of 3 clips" in str(caught.value) and "(b.mp4, c.mp4)" in str(caught.value)
    assert "allow_empty_captions" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_caption_with_a_typo_in_its_name_is_named_with_the_clip_that_lacks_one(tmp_path):
    add_clip(tmp_path, "bird.mp4", None, 1)
    (tmp_path / "videos" / "brid.txt").write_text("a bird")
    config = config_for(tmp_path, tmp_path / "no_weights", allow_empty_captions=False)
    with pytest.raises(DataError, match=r"^.*\(bird\.mp4; captions without a video: brid\.txt\).*$"):
        prepare(config)
    (tmp_path / "videos" / "my_clips.jsonl").write_text('{"video_path": "bird.mp4", "caption": "a bird"}')
    (tmp_path / "videos" / "bird.json").touch()
    with pytest.raises(DataError, match=r"my_clips\.jsonl is not read: a table of captions must be metadata\.jsonl\)"):
        prepare(config)


def test_captions_without_a_video_are_warned_of(tmp_path, capsys):
    add_clip(tmp_path, "a.mp4", "a cat", 1)
    config = config_for(tmp_path, tmp_path / "no_weights", allow_empty_captions=False)
    for number in range(12):
        with pytest.raises(CheckpointError):
            prepare(config)
        names = [f"{i:02}.txt" for i in range(number)]
        more = f" and {number - 10} more" if number > 10 else ""
        line = f"captions without a video of that name, not used: {', '.join(names[:10])}{more}\n" if names else ""
        assert capsys.readouterr().out == line
        (tmp_path / "videos" / f"{number:02}.txt").write_text("a dog")


class Lives:
    """Records the models of some classes that run in the block: their number, dtype, and whether they are freed."""

    def __init__(self, *classes):
        self.classes = classes
        self.models, self.dtypes, self.company = weakref.WeakSet(), {}, []

    def __enter__(self):
        self.handle = torch.nn.modules.module.register_module_forward_pre_hook(self.note)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def note(self, module, _):
        # The first layer of the VAE's encoder, the only one with Fourier features.
        if isinstance(module, self.classes) and getattr(module, "in_features", 15) == 15:
            self.models.add(module)
            # accelerate creates a reference cycle in a model that it moves to a GPU, which `del` does not free.
            module.__dict__["knot"] = [module]
            self.dtypes.setdefault(type(module), set()).update(p.dtype for p in module.parameters() if p.ndim > 1)
            self.company.append(len(self.models))


def test_t5_runs_in_fp32_whatever_the_models_run_in_and_no_model_outlives_its_stage(good):
    config = config_for(good, cache=str(good / "other"))
    gc.collect()
    gc.disable()
    try:
        with Lives(T5EncoderModel, PointwiseConv) as lives:
            prepare(config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bf16"})}))
        left = len(lives.models)
    finally:
        gc.enable()
    assert lives.dtypes == {T5EncoderModel: {torch.float32}, PointwiseConv: {torch.bfloat16}}
    assert set(lives.company) == {1} and left == 0
    with_t5 = open_cache(good / "cache", BUCKETS)
    cache = open_cache(good / "other", BUCKETS)
    assert (cache.settings.vae_dtype, cache.settings.t5_dtype) == ("bf16", "fp32")
    for index in range(len(cache)):
        assert torch.equal(cache.read(index)["prompt_embeds"], with_t5.read(index)["prompt_embeds"])


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_t5_may_run_in_bf16_or_int8_which_encodes_the_captions_anew_and_no_clip(good, dtype):
    shutil.copytree(good / "cache", good / f"rounded_{dtype}")
    config = config_for(good, cache=str(good / f"rounded_{dtype}"))
    config = config.model_copy(update={"memory": MemoryConfig(t5_dtype=dtype)})
    done = prepare(config)
    exact, rounded = (open_cache(good / name, BUCKETS) for name in ("cache", f"rounded_{dtype}"))
    assert done.clips_encoded == 0 and done.captions_encoded > 0 and rounded.settings.t5_dtype == dtype
    assert exact.fingerprint != rounded.fingerprint
    encoder = WeightsFolder(TINY).load_text_encoder("cpu", T5_DTYPES[dtype])
    for index in range(len(exact)):
        ours, theirs = (cache.read(index)["prompt_embeds"] for cache in (rounded, exact))
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs) == (not rounded.rows[index].captions[0])
        assert torch.equal(ours, encoder.encode([rounded.rows[index].captions[0]])[0])
        # bf16 has 8 bits of precision; logits of random weights are large, and softmax amplifies the error.
        assert (ours - theirs).norm() <= 0.25 * theirs.norm()


def test_missing_weights_are_reported_before_any_clip_is_decoded(tmp_path):
    add_clip(tmp_path, "a.mp4", "a cat", 1)
    with pytest.raises(CheckpointError, match="weights pull"):
        prepare(config_for(tmp_path, tmp_path / "no_weights"))
    assert not (tmp_path / "cache").exists()


def test_when_no_clip_can_be_used_the_report_says_why(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "garbage.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "videos" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    with pytest.raises(DataError, match="none of the 2 clips") as caught:
        prepare(config_for(tmp_path))
    assert "\n" not in str(caught.value) and "report.csv" in str(caught.value)
    report = report_of(tmp_path)
    assert {name: record["status"] for name, record in report.items()} == dict.fromkeys(report, "refused")
    assert "cannot be opened" in report["gone.mp4"]["reason"]
    assert report["garbage.mp4"]["reason"]
    with pytest.raises(DataError, match="there is no cache"):
        open_cache(tmp_path / "cache", BUCKETS)


def test_after_a_kill_the_same_command_goes_on_from_there(tmp_path, capsys):
    num_clips = 6
    for number in range(num_clips):
        add_clip(tmp_path, f"{number}.mp4", f"a ball number {number}", first_number=20 * number)
    cache = tmp_path / "cache"
    # Each file is opened, synced and renamed: this is before the third clip's latents are renamed.
    paths = [f"data.videos={tmp_path / 'videos'}", f"data.cache={cache}", f"run_dir={tmp_path / 'run'}"]
    kill = Disturbance(cache, signal_before=".safetensors.tmp", nth=9)
    assert run_program(["prepare", "conf=my_lora", *SIZES, *paths], tmp_path / "log", kill)[0] == -signal.SIGKILL
    found = len(list(cache.glob("parts/latents-*.safetensors")))
    assert found == 2
    with pytest.raises(DataError, match="incomplete"):
        open_cache(tmp_path / "cache", BUCKETS)
    assert main(config_for(tmp_path)) == 0
    out = capsys.readouterr().out
    assert f"encoded now: {num_clips - found} clips and {num_clips} captions, reused: {found} clips" in out
    assert sorted(os.listdir(tmp_path / "cache")) == [
        ".files.json",
        ".lock",
        ".scans.json",
        "data",
        "manifest.json",
        "report.csv",
    ]
    cache = open_cache(tmp_path / "cache", BUCKETS)
    encoder = WeightsFolder(TINY).load_encoder("cpu", torch.float32)
    for index, row in enumerate(cache.rows):
        clip = decode_clip(tmp_path / "videos" / row.path, Cut(**GEOMETRY))
        mean, _ = encoder(frames_to_pixels(clip.frames[None]))
        assert relative_error(cache.read(index)["mean"], mean[0]) <= TOLERANCE


def test_a_clip_is_saved_while_the_next_one_is_encoded(tmp_path, monkeypatch):
    begun, encode, put = [], encode_frames, CacheWriter.put_latents
    is_next = threading.Event()

    def encode_noted(encoder, frames, name):
        begun.append(name)
        if len(begun) == 2:
            is_next.set()
        return encode(encoder, frames, name)

    def put_later(cache, *args):
        assert is_next.wait(60), "the next clip was not begun"
        put(cache, *args)

    monkeypatch.setattr("mochi_tune.data_prep.tasks.encode_frames", encode_noted)
    monkeypatch.setattr(CacheWriter, "put_latents", put_later)
    for i, name in enumerate(("a.mp4", "b.mp4")):
        add_clip(tmp_path, name, "a red bird", first_number=40 * i)
    assert prepare(config_for(tmp_path)).clips_encoded == 2


def test_a_clip_that_cannot_be_saved_ends_the_run(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CacheWriter, "put_latents", fail)
    add_clip(tmp_path, "a.mp4", "a red bird")
    with pytest.raises(OSError, match="No space left"):
        prepare(config_for(tmp_path))


def test_a_gpu_that_is_not_there_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=cuda"):
        find_device("cuda")
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")


class FullEncoder(torch.nn.Module):
    """An encoder that runs out of memory."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList()
        self.output_proj = torch.nn.Linear(1, 1)

    def embed(self, pixels):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_clip_that_does_not_fit_the_gpu_is_named():
    with pytest.raises(DataError, match=r"a\.mp4: encoding 7 frames of 48x32 needs more memory"):
        encode_frames(FullEncoder(), torch.zeros(7, 32, 48, 3, dtype=torch.uint8), "a.mp4")
