"""The page of a run: its content, that it needs no network, and that its errors do not end the run."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers_road import LORA, read_rows, road, train

from mochi_tune.config.load import load_config
from mochi_tune.recipes.train_lora import main as train_lora
from mochi_tune.training.checkpoint import find_checkpoints, step_of
from mochi_tune.training.report import ReportWriter, make_report, next_steps, read_files
from mochi_tune.training.report_curves import OTHERS
from mochi_tune.training.resume import read_clips

PROMPT = """a <b>"red" ball</b> & </table> 'rolls'"""
VOID = {"meta", "img", "link", "br", "source"}
MORE = [
    *LORA, "train.warmup_steps=2", "train.learning_rate=1e-3", "train.validate_every=4", "train.sample_every=6",
    "train.checkpoint_every=4", "train.keep_best=true", "train.sample_prompts=" + json.dumps([PROMPT, "a cat"]),
    "sample.steps=1",
]  # fmt: skip


def run(run_dir: Path, *more: str) -> int:
    settings = [s for s in road(run_dir, *MORE, *more) if s not in ("train.sample_every=0", "train.validate_every=0")]
    return train_lora(load_config("my_lora", settings))


class Reader(HTMLParser):
    """Reads a page and checks that every element is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.texts, self.links, self.tags = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("src", "href", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 8 steps that was resumed up to step 12."""
    run_dir = tmp_path_factory.mktemp("run")
    assert run(run_dir, "train.steps=8") == 0
    shutil.copy(run_dir / "report.html", run_dir / "first.html")
    assert run(run_dir, "train.steps=12") == 0
    return run_dir


@pytest.fixture
def page(finished) -> Reader:
    return Reader((finished / "report.html").read_text(encoding="utf-8"))


def test_the_page_has_every_part(page, finished):
    headings = ["Samples", "Curves", "What to do next", "Data, model and settings", "Training loss", "Validation loss"]
    headings += ["Validation loss by noise level", "Learning rate", "Seconds a step", "Device", "Cache", "LoRA"]
    assert [one for one in headings if one not in page.texts] == []
    text = " ".join(page.texts)
    assert "3 of 7 frames of 32x48" in text and "rank 2, alpha 16" in text and "cpu, " in text
    assert all(f"\u03c3 {level}" in page.texts for level in ("0.125", "0.375", "0.625", "0.875"))
    assert "3, none of them held out for validation" in page.texts
    assert "median of the last 12" in page.texts and "of the last step" in page.texts
    assert "each step" in page.texts and not any(text.startswith("mean of") for text in page.texts)
    run_files = read_files(finished)
    clips = run_files.clips | {"held_out": 2}
    assert "trained on 1 clip." in make_report(replace(run_files, clips=clips))


def test_it_needs_no_network_and_the_videos_are_where_it_says(page, finished):
    text = (finished / "report.html").read_text()
    assert not re.search(r"https?://|//\w|@import|url\(", text.replace("</", ""))
    assert len(page.links) == 2 * 4 and all((finished / link).is_file() for link in page.links)
    names = [f"samples/step_{step:06d}_prompt_{i}.mp4" for i in range(2) for step in (0, 6, 8, 12)]
    assert page.links == names


def test_texts_of_users_are_read_as_they_were_given(page):
    assert PROMPT in page.texts and not [tag for tag, _ in page.tags if tag == "b"]


def test_base_and_lora_are_named_under_every_video(page):
    assert page.texts.count("base") == page.texts.count("LoRA") - 1 == 8
    assert [t.strip() for t in page.texts if t.startswith("step ") and "best" not in t][:1] == ["step 0"]


def test_a_video_stands_under_the_prompt_that_it_was_rendered_from(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert (copy / "samples" / "step_000012_prompt_0.txt").read_text() == PROMPT
    for step in (0, 6):
        (copy / "samples" / f"step_{step:06d}_prompt_0.txt").write_text("the prompt of an earlier start")
    page = Reader(make_report(read_files(copy)))
    texts = [text for text in page.texts if text in (PROMPT, "the prompt of an earlier start")]
    assert texts[:2] == ["the prompt of an earlier start", PROMPT] and len(page.links) == 2 * 4
    early, late = [f"samples/step_{step:06d}_prompt_0.mp4" for step in (0, 6)], "samples/step_000008_prompt_0.mp4"
    assert page.links[:3] == [*early, late]


def test_the_best_step_is_that_of_the_lowest_validation_loss(page, finished):
    rows = read_rows(finished / "validation.jsonl")
    best = min(rows, key=lambda row: row["validation_loss"])["step"]
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    assert f"best: step {best}" in page.texts
    marked = [t for t in page.texts if t.endswith("\u00b7 best")]
    assert marked == ([f"step {best} \u00b7 best"] if best in (0, 6, 8, 12) else [])


def test_a_better_step_in_the_middle_is_marked_and_its_checkpoint_named(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    rows = read_rows(copy / "validation.jsonl")
    for row, loss in zip(rows, (4.0, 3.0, 2.0, float("nan")), strict=True):
        row["validation_loss"] = loss
    (copy / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = read_files(copy)
    text = make_report(files)
    assert files.best == (8, 2.0) and "step 8 \u00b7 best" in text and "best: step 8" in text
    [render, *exports] = next_steps(files)
    assert [re.findall(r"to=(\w+)", command) for _, command in exports] == [["diffusers"], ["comfyui"]]
    assert "the best checkpoint, step 8" in render[0]
    assert f"adapter={finished}/checkpoints/step_000008/adapter.safetensors" in render[1]


def test_losses_of_other_clips_are_drawn_apart_from_those_that_are_compared(finished):
    files = read_files(finished)
    rows = [
        row | {"measured_on": kind, "validation_loss": loss, "held_out": kind == "now"}
        for row, kind, loss in zip(files.validations, ("a", "b", "now", "now"), (0.2, 0.1, 2.5, 2.0), strict=True)
    ]
    page = Reader(make_report(replace(files, validations=rows)))
    assert page.texts.count(OTHERS) == 1 and "best: step 12" in page.texts and OTHERS not in make_report(files)
    at = page.tags.index(("svg", next(tag for name, tag in page.tags if tag.get("aria-label") == "Validation loss")))
    lines = [tag for name, tag in page.tags[at:] if name == "polyline"][:3]
    drawn = [(line["class"], len(line["points"].split())) for line in lines]
    assert drawn == [("thin", 1), ("thin", 1), ("accent", 2)]
    assert "at step 12, on clips that are held out" in page.texts


def test_a_resumed_run_goes_on_with_its_curves(finished):
    first, last = (Reader((finished / name).read_text()) for name in ("first.html", "report.html"))

    def ends(reader: Reader) -> list[str]:
        return [attributes["points"].split()[0] for tag, attributes in reader.tags if tag == "polyline"]

    # The curve of 12 steps begins left of that of 8, and both have all steps.
    points = [
        max(len(attributes["points"].split()) for tag, attributes in reader.tags if tag == "polyline")
        for reader in (first, last)
    ]
    assert points == [8, 12] and len(ends(first)) == len(ends(last))
    assert "It is finished." in " ".join(last.texts) and "Resumed from steps" in last.texts
    assert "Resumed from steps" not in first.texts


def test_the_commands_are_ones_that_work(finished):
    [(_, sample), (_, export), _] = next_steps(read_files(finished))
    words = shlex.split(sample)
    assert words[:2] == ["mochi-tune", "sample"] and f"prompt={PROMPT}" in words
    conf = next(word for word in words if word.startswith("conf=")).removeprefix("conf=")
    config = load_config(conf, ["sample." + word for word in words if word.startswith("adapter=")])
    assert Path(str(config.sample.adapter)).is_file() and "to=diffusers" in shlex.split(export)


def test_a_page_that_cannot_be_written_costs_a_line_and_the_run_goes_on(tmp_path, capsys):
    # Not even root, who may run this test, can replace a folder by a file.
    (tmp_path / "report.html").mkdir(parents=True)
    assert train(tmp_path, "train.steps=3", "train.validate_every=1") == 0
    said = capsys.readouterr()
    assert said.err.count("report.html cannot be written") == 1 and "report: " not in said.out
    assert (tmp_path / "adapter.safetensors").is_file() and f"adapter: {tmp_path}" in said.out
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_a_damaged_file_costs_a_line(finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "validation.jsonl").write_text('{"validation_loss": 1}\n')
    writer = ReportWriter(copy, load_config(str(copy / "config.yaml"), []))
    writer.write()
    writer.write()
    assert capsys.readouterr().err.count("\n") == 1 and writer.closing_lines() == []
    assert (copy / "report.html").read_bytes() == (finished / "report.html").read_bytes()


def test_a_page_that_is_made_again_reads_the_rows_that_are_new_alone(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    config, rows = load_config(str(copy / "config.yaml"), []), (copy / "metrics.jsonl").read_bytes()
    read = rows.index(b"\n", len(rows) // 2) + 1
    writer = ReportWriter(copy, config)
    # A full disk leaves an incomplete row for a while.
    (copy / "metrics.jsonl").write_bytes(rows[: read + 9])
    writer.write()
    # The row of the last step may be incomplete, and the adapter is of its checkpoint.
    assert f"last: step {rows.count(10)}" in "\n".join(writer.closing_lines())
    (copy / "metrics.jsonl").write_bytes(b"x" * read + rows[read:])
    writer.write()
    again = (copy / "report.html").read_bytes()
    (copy / "metrics.jsonl").write_bytes(rows)
    ReportWriter(copy, config).write()
    assert again == (copy / "report.html").read_bytes() == (finished / "report.html").read_bytes()


def test_a_report_is_made_without_the_clips_of_the_last_start(finished, tmp_path):
    """Only notes use the file, and a crash may have left it incomplete."""
    for text in ("", "{", "[]", '{"cache": "x", "clips": 3}'):
        (tmp_path / "clips.json").write_text(text)
        assert read_clips(tmp_path) == {}
    assert read_clips(finished)["clips"]
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "clips.json").write_text("{")
    (copy / "report.html").unlink()
    ReportWriter(copy, load_config(str(copy / "config.yaml"), [])).write()
    assert (copy / "report.html").exists()


def test_train_begins_and_ends_with_what_one_wants_to_know(tmp_path, capsys):
    assert run(tmp_path, "train.steps=4", "train.warmup_steps=9", "train.learning_rate=0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    size = "adapter: LoRA of rank 2, alpha 16 (scale 8), 17,472 parameters in 13 layers"
    for start in ("device: cpu, ", size, "data: 3 clips to train on, "):
        assert any(line.startswith(start) for line in lines), start
    assert "4 steps of 1 sample: 1.33 epochs" in "".join(lines)
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert ["warmup_steps=9" in warnings[0], "learning_rate=0.5" in warnings[1], len(warnings)] == [True, True, 2]
    validations = [line for line in lines if ": validation loss " in line]
    assert len(validations) == 2 and validations[0].endswith("the best so far")
    assert [line.split(":")[0] for line in lines[-4:]] == ["adapter", "best and last", "report", "next"]
    assert lines[-1].startswith("next: mochi-tune sample ")


def test_a_run_whose_settings_are_usual_is_not_warned_of(tmp_path, capsys):
    assert train(tmp_path, "train.steps=2", "train.warmup_steps=1") == 0
    assert "warning" not in capsys.readouterr().out


def test_the_last_line_has_the_step_of_the_adapter_and_not_of_later_rows(finished, tmp_path):
    """A run killed after its checkpoint leaves the rows of later steps, and with fewer steps it is complete."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    step = max(step_of(folder) for folder in find_checkpoints(copy / "checkpoints"))
    row = json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row | {"step": step + 1}) + "\n")
    writer = ReportWriter(copy, load_config(str(copy / "config.yaml"), []))
    writer.write()
    said = "\n".join(writer.closing_lines())
    assert f"last: step {step}, validation loss" in said and f"step {step + 1}" not in said
