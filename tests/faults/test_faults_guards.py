"""What would harm a run is stopped before it does: wild numbers, damaged clips, a second trainer, a full disk."""

import json
import resource
import shutil
import signal
import socket
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from helpers_cache import BUCKETS
from helpers_faults import STEP, assert_same_end, newest_checkpoint, rows_of
from helpers_golden import GRADIENT_TOLERANCE, TOLERANCE
from helpers_process import Disturbance, Program, run_program
from helpers_road import LORA, prepared, read_rows, road, train
from safetensors.torch import load_file

from mochi_tune.config.load import load_config
from mochi_tune.data.cache import open_cache
from mochi_tune.errors import DataError, MochiTuneError, TrainingError
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.parallel.kernels import KERNELS
from mochi_tune.recipes import replay as replaying
from mochi_tune.recipes.replay import main as replay
from mochi_tune.training.checkpoint import damage_of

WILD = ["train.steps=9", "train.learning_rate=1e30", "train.warmup_steps=0", "train.max_grad_norm=1e30"]
SPIKY = ["train.steps=24", "train.spike_factor=1.05", "lora.dropout=0.1", "lora.rank=2"]


def assert_refused(run_dir: Path, text: str, micro_batches: int) -> dict:
    """Checks a run that refused a step; returns what its bundle tells."""
    assert "Traceback" not in text and text.count("the update was not made") == 1, text
    [bundle] = (run_dir / "bundles").iterdir()
    facts = json.loads((bundle / "step.json").read_text())
    done = rows_of(run_dir)[-1]["step"]
    assert facts["step"] == done + 1 and f"mochi-tune replay {bundle}" in text
    assert len(facts["clips"]) == len(facts["sigmas"]) == micro_batches and facts["seed"] == 0
    saved = newest_checkpoint(run_dir)
    assert saved.name == f"step_{done:06d}" and damage_of(saved) == "", "the step before is saved"
    adapter, in_bundle = (load_file(folder / "adapter.safetensors") for folder in (saved, bundle))
    assert all(torch.equal(adapter[name], in_bundle[name]) for name in in_bundle)
    return facts


@pytest.mark.parametrize("processes", [1, 2])
def test_a_number_that_is_not_finite_stops_all_ranks_before_the_update(tmp_path, processes):
    run_dir = tmp_path / "run"
    # What a replay looks at is no part of what a checkpointed block keeps.
    alone = ["train.accumulation_steps=2", "train.recompute=block"]
    more = alone if processes == 1 else ["parallel.num_processes=2", "parallel=data"]
    code, text = run_program(["train", "conf=my_lora", *road(run_dir, *LORA, *WILD, *more)], tmp_path / "out")
    assert code == 2, text
    facts = assert_refused(run_dir, text, micro_batches=2)
    assert facts["why"] == "not finite"

    # The same step again, from the bundle alone: the same numbers, and where they were lost.
    [bundle] = (run_dir / "bundles").iterdir()
    code, text = run_program(["replay", str(bundle), "device=cpu"], tmp_path / "replay")
    assert code == 1 and "not finite first: the" in text and "blocks." in text, text
    assert all(
        f"{clip} (sigma {sigma:.3f})" in text for clip, sigma in zip(facts["clips"], facts["sigmas"], strict=True)
    )


def test_a_step_is_not_replayed_on_another_base_or_cache_and_a_missing_bundle_is_named(tmp_path):
    code, text = run_program(["train", "conf=my_lora", *road(tmp_path / "run", *LORA, *WILD)], tmp_path / "out")
    assert code == 2, text
    [bundle] = (tmp_path / "run" / "bundles").iterdir()
    whole = json.loads((bundle / "step.json").read_text())
    for key, message in (
        ("cache", "has other clips or captions than the run's"),
        ("base", "another base than"),
    ):
        changed = whole | {"identity": whole["identity"] | {key: "0" * 64}}
        (bundle / "step.json").write_text(json.dumps(changed))
        with pytest.raises(MochiTuneError, match=message):
            replay(bundle, "cpu")
    (bundle / "step.json").write_text(json.dumps(whole | {"draws": {}}))
    with pytest.raises(MochiTuneError, match=r"has no draws: it is not a bundle of a run"):
        replay(bundle, "cpu")
    with pytest.raises(MochiTuneError, match=rf"step_9 is not a bundle .* use one of {bundle}"):
        replay(bundle.with_name("step_9"), "cpu")


@pytest.mark.parametrize("more", [[], ["train.recompute=block"]], ids=["plain", "checkpointed"])
def test_a_replayed_step_has_the_numbers_of_the_run(tmp_path, more):
    """A spike stops the run; its step, made again from the bundle, has the run's own loss and norm."""
    with pytest.raises(TrainingError, match=r"times the usual, on clip_.*the update was not made") as error:
        spiky = [setting.replace("1.05", "1.005") for setting in SPIKY]
        train(tmp_path, *spiky, "train.spike_policy=stop", "train.accumulation_steps=2", "train.batch_size=2", *more)
    facts = assert_refused(tmp_path, str(error.value), micro_batches=4)
    [bundle] = (tmp_path / "bundles").iterdir()
    made = replay(bundle, "cpu")
    assert made.is_finite and made.loss == pytest.approx(facts["loss"], rel=TOLERANCE)
    assert made.grad_norm == pytest.approx(facts["grad_norm"], rel=GRADIENT_TOLERANCE)
    assert [each.clip for each in made.samples] == facts["clips"]
    assert len({each.loss for each in made.samples}) == len({each.grad_norm for each in made.samples}) == 4
    assert not any(each.origin for each in made.samples)


@pytest.mark.parametrize("is_old", [False, True])
def test_a_step_is_replayed_by_the_kernel_and_the_modulation_of_its_run(tmp_path, monkeypatch, is_old):
    with pytest.raises(TrainingError):
        train(tmp_path, *WILD)
    [bundle] = (tmp_path / "bundles").iterdir()
    facts = json.loads((bundle / "step.json").read_text())
    # Of a run on a CPU, which has one kernel.
    assert facts["attention"] is None and facts["host_modulation"] is True
    facts = {k: v for k, v in facts.items() if k not in ("attention", "host_modulation")}
    if not is_old:
        facts |= {"attention": "efficient", "host_modulation": True}
    (bundle / "step.json").write_text(json.dumps(facts))
    seen, forward = [], AsymmDiT.forward

    def noted(self, *inputs):
        seen.append((torch._C._get_sdp_priority_order()[0], inputs[4] is not None))
        return forward(self, *inputs)

    monkeypatch.setattr(AsymmDiT, "forward", noted)
    usual = torch._C._get_sdp_priority_order()[0]
    here = replay(bundle, "cpu")
    # As on a GPU that has the kernel.
    monkeypatch.setattr(replaying, "has_kernel", lambda *_: True)
    there = replay(bundle, "cpu")
    if is_old:
        assert here.attention == there.attention == "the CPU's kernel" and seen == 2 * [(usual, False)]
    else:
        assert here.attention == "the CPU's kernel: the run's kernel, efficient, is not available here"
        assert there.attention == "efficient, as in the run"
        assert seen == [(usual, True), (int(KERNELS["efficient"].value), True)]
    assert not here.is_finite and not there.is_finite and here.samples[0].origin


def test_a_spike_is_reported_or_skipped_and_always_the_same(tmp_path):
    for policy in ("warn", "skip", "off"):
        assert train(tmp_path / policy, *SPIKY, f"train.spike_policy={policy}") == 0
    warned, skipped, off = (rows_of(tmp_path / policy) for policy in ("warn", "skip", "off"))
    spikes = [row["step"] for row in warned if "spike" in row]
    assert spikes and min(spikes) > 10 and not any("spike" in row for row in off)
    assert [row["loss"] for row in warned] == [row["loss"] for row in off], "a warning changes nothing"
    left_out = [row["step"] for row in skipped if row.get("spike") == "skip"]
    assert left_out[0] == spikes[0]
    optimizer = load_file(tmp_path / "skip/checkpoints/step_000024/optimizer.safetensors")
    made = next(value.item() for key, value in optimizer.items() if key.endswith("/step"))
    assert made == 24 - len(left_out), "no update was made of them"

    # Stopped and gone on from in the middle, it leaves out the same ones.
    again = tmp_path / "again"
    arguments = ["train", "conf=my_lora", *road(again, *LORA, *SPIKY, "train.spike_policy=skip")]
    program = Program(arguments, tmp_path / "out", Disturbance(hold=STEP, hold_at=(13,)))
    program.wait_until_held()
    program.send(signal.SIGTERM)
    program.release()
    assert program.wait() == 143 and len(rows_of(again)) == 13
    assert train(again, *SPIKY, "train.spike_policy=skip") == 0
    assert_same_end(again, tmp_path / "skip")


def damaged_cache(folder: Path, spoil: str) -> Path:
    """Returns a copy of the prepared cache in which one clip's numbers are other ones."""
    shutil.copytree(prepared() / "cache", folder)
    [shard] = (folder / "data").iterdir()
    data = bytearray(shard.read_bytes())
    with pq.ParquetFile(shard) as file:
        column = file.metadata.row_group(1).column(file.schema_arrow.names.index("mean"))
        start = column.data_page_offset + column.total_compressed_size // 2
    if spoil == "flip":
        data[start] ^= 1
    else:
        data[start - start % 4 + 3 : start - start % 4 + 8] = b"\x11" * 5
    shard.write_bytes(data)
    return folder


@pytest.mark.parametrize("spoil", ["flip", "burst"])
def test_a_clip_whose_numbers_changed_stops_the_run_or_is_left_out(tmp_path, spoil):
    cache = damaged_cache(tmp_path / "cache", spoil)
    settings = [*LORA, "train.steps=9", f"data.cache={cache}"]
    with pytest.raises(DataError, match=r"parquet is damaged \(clip_1\.mp4 is not what was written\).*quarantine"):
        train(tmp_path / "strict", *settings)
    assert train(tmp_path / "whole", *LORA, "train.steps=9") == 0
    assert train(tmp_path / "run", *settings, "data.damaged=quarantine") == 0
    ours, theirs = ([row["clips"][0] for row in rows_of(tmp_path / name)] for name in ("run", "whole"))
    assert "clip_1.mp4" in theirs and "clip_1.mp4" not in ours
    assert all(a == b for a, b in zip(ours, theirs, strict=True) if b != "clip_1.mp4"), "the order of the rest is kept"
    assert train(tmp_path / "again", *settings, "data.damaged=quarantine") == 0
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "run")


def test_too_many_damaged_clips_are_no_accident(tmp_path):
    cache = damaged_cache(tmp_path / "cache", "flip")
    [shard] = (cache / "data").iterdir()
    data = bytearray(shard.read_bytes())
    with pq.ParquetFile(shard) as file:
        column = file.metadata.row_group(0).column(file.schema_arrow.names.index("logvar"))
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    shard.write_bytes(data)
    message = r"2 of 3 clips are damaged, and data\.damaged=quarantine replaces at most a tenth.*encodes [^;]*$"
    with pytest.raises(DataError, match=message):
        train(tmp_path / "run", *LORA, "train.steps=9", f"data.cache={cache}", "data.damaged=quarantine")


def test_a_number_in_the_cache_that_is_not_finite_is_found_when_it_is_read(tmp_path):
    """Its sum is right, as of a cache that was written by something else."""
    from mochi_tune.data.rows import content_sha256
    from mochi_tune.files import file_sha256

    shutil.copytree(prepared() / "cache", tmp_path / "cache")
    [shard] = (tmp_path / "cache/data").iterdir()
    tables = pq.read_table(shard).to_pylist()
    tables[2]["mean"][5] = float("nan")
    whole = open_cache(tmp_path / "cache", BUCKETS).read(2)
    mean = torch.tensor(tables[2]["mean"], dtype=torch.float32).view(whole["mean"].shape)
    tables[2]["content_sha256"] = content_sha256(mean, whole["logvar"], [whole["prompt_embeds"]])
    import pyarrow as pa

    with pq.ParquetWriter(shard, schema := pq.read_schema(shard), compression="none", use_dictionary=False) as writer:
        for row in tables:
            writer.write_table(pa.Table.from_pylist([row], schema))
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    manifest["shards"][0] |= {"bytes": shard.stat().st_size, "sha256": file_sha256(shard)}
    (tmp_path / "cache/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"the mean of clip_2\.mp4 holds NaN or infinity"):
        train(tmp_path / "run", *LORA, "train.steps=9", f"data.cache={tmp_path / 'cache'}")


def test_a_dead_trainers_lock_is_recovered_and_a_living_ones_is_not(tmp_path):
    run_dir, arguments = tmp_path / "run", ["train", "conf=my_lora", *road(tmp_path / "run", *LORA, "train.steps=4")]
    first = Program(arguments, tmp_path / "first", Disturbance(hold=STEP, hold_at=(2,)))
    first.wait_until_held()
    code, text = run_program(arguments, tmp_path / "second")
    assert code == 2 and f"process {first.pid} of host {socket.gethostname()}, started 20" in text
    assert len(text.strip().splitlines()) == 1
    first.send(signal.SIGKILL)
    first.wait()
    assert json.loads((run_dir / ".lock").read_text())["pid"] == first.pid, "it could not clear its lock away"
    code, text = run_program(arguments, tmp_path / "third")
    assert code == 0, text
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [1, 2, 3, 4]


def limit_files(pid: int, num_bytes: int) -> None:
    """Lets no file of a process grow beyond a size: what it writes fails in the middle, as on a full disk."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


@pytest.mark.parametrize("num_bytes", [0, 3000, 40000])
def test_a_disk_that_is_full_for_a_while_costs_nothing_but_the_saves(tmp_path, num_bytes):
    run_dir = tmp_path / "run"
    settings = ["train.steps=20", "train.checkpoint_every=4", "train.keep_checkpoints=2", "train.validate_every=10"]
    settings += ["train.validation_clips=1", "train.sample_every=10", "train.sample_prompts=[a cat]", "sample.steps=1"]
    arguments = ["train", "conf=my_lora", *road(run_dir, *LORA, *settings)]
    program = Program(arguments, tmp_path / "out", Disturbance(hold=STEP, hold_at=(6, 14)))
    program.wait_until_held()
    limit_files(program.pid, num_bytes)
    program.release()
    program.wait_until_held(2)
    assert program.text().count("could not be saved") == 2, program.text()
    whole = newest_checkpoint(run_dir)
    assert damage_of(whole) == "" and f"the last checkpoint is {whole}" in program.text(), "the old one is whole"
    assert not list((run_dir / "checkpoints").glob(".tmp*")), "nothing is left of the ones that failed"
    video = run_dir / "samples/step_000010_prompt_0.mp4"
    is_lost = f"{video} could not be written (File too large): the run goes on without it" in program.err
    assert is_lost == (not video.exists()) == (num_bytes < 40000), program.text()
    assert not list((run_dir / "samples").glob(".*")), "nothing is left of the video either"
    limit_files(program.pid, resource.RLIM_INFINITY)
    program.release()
    assert program.wait() == 0, program.text()
    assert f"report: {run_dir / 'report.html'}" in program.out, "it could be written again"
    assert train(tmp_path / "straight", *settings) == 0
    assert_same_end(run_dir, tmp_path / "straight")
    assert (run_dir / "samples/step_000020_prompt_0.mp4").exists()


def test_a_disk_that_stays_full_is_an_error_in_the_end(tmp_path):
    run_dir = tmp_path / "run"
    arguments = ["train", "conf=my_lora", *road(run_dir, *LORA, "train.steps=20", "train.checkpoint_every=4")]
    program = Program(arguments, tmp_path / "out", Disturbance(hold=STEP, hold_at=(6,)))
    program.wait_until_held()
    limit_files(program.pid, 3000)
    program.release()
    assert program.wait() == 2, program.text()
    last = program.text().strip().splitlines()[-1]
    assert "step 20 could not be saved" in last and "checkpoints/step_0000" in last and "make room" in last
    code, text = run_program(arguments, tmp_path / "again")
    assert code == 0 and "resuming" in text, text
    assert train(tmp_path / "straight", "train.steps=20", "train.checkpoint_every=4") == 0
    assert_same_end(run_dir, tmp_path / "straight")


def test_a_full_disk_shows_before_the_first_step(tmp_path):
    arguments = ["train", "conf=my_lora", *road(tmp_path / "run", *LORA, "train.steps=3")]
    code, text = run_program(arguments, tmp_path / "out", Disturbance(file_bytes=30000))
    assert code == 2 and "a checkpoint takes" in text.splitlines()[-1], text
    assert rows_of(tmp_path / "run") == []


@pytest.mark.parametrize("place", ["/proc/mochi_tune", "/sys/mochi_tune", "FILE/run"])
def test_a_place_that_cannot_be_written_shows_before_a_weight_is_read(tmp_path, place):
    (tmp_path / "file").write_text("")
    place = place.replace("FILE", str(tmp_path / "file"))
    config = [*road(tmp_path, *LORA, "train.steps=1")[:-1], f"run_dir={place}"]
    code, text = run_program(["train", "conf=my_lora", *config], tmp_path / "out")
    assert code == 2 and len(text.strip().splitlines()) == 1 and place.split("/run")[0] in text, text
    assert "choose another path" in text


def test_a_bundle_that_is_not_whole_is_one_line(tmp_path):
    (tmp_path / "step.json").write_text("{}")
    code, text = run_program(["replay", str(tmp_path)], tmp_path / "out")
    assert code == 2 and "it is not a bundle of a run" in text and len(text.strip().splitlines()) == 1
    assert load_config("my_lora", []).train.spike_policy == "warn"
