"""What the tab Train draws, and when: charts with distinguishable runs, and the plan."""

import json
import re
from pathlib import Path

import pytest
from helpers_jobs import put

pytest.importorskip("gradio")

from mochi_tune.errors import DataError
from mochi_tune.ui import train_tab
from mochi_tune.ui.confs import MAIN_KEYS
from mochi_tune.ui.jobs import Job, list_jobs
from mochi_tune.ui.page import build_page
from mochi_tune.ui.train_tab import charts_html, check_prepared, figures_html


def write_run(folder: Path, number: int, validates: bool) -> str:
    run_dir = folder / "runs" / f"run_{number:02d}"
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    if validates:
        (run_dir / "validation.jsonl").write_text(json.dumps({"step": 1, "validation_loss": 1.0}) + "\n")
    return f"runs/run_{number:02d}"


def test_runs_over_one_another_look_different_and_each_the_same_in_all_charts(tmp_path):
    names = [write_run(tmp_path, number, validates=number != 2) for number in range(20)]
    loss, validation = charts_html(tmp_path, names).split("<figure>")[1:]
    styles, others = (dict(re.findall(r'<i class="([^"]+)"></i>([^<]+)', chart)) for chart in (loss, validation))
    assert len(styles) == 20 and len(others) == 19 and styles | others == styles
    assert all(f'<polyline class="{style}"' in loss for style in styles)
    looks = (Path(train_tab.__file__).parent / "page.css").read_text()
    for word in {word for style in styles for word in style.split()[1:]}:
        assert f".charts polyline.{word} {{" in looks and f".charts .legend .{word} {{" in looks


def test_a_run_has_links_to_its_numbers(tmp_path):
    shown = figures_html(tmp_path, [write_run(tmp_path, 1, validates=False)])
    assert re.search(r'href="/files/runs/run_01/metrics.jsonl[^"]*" target="_blank">numbers of each step</a>', shown)
    assert "validation.jsonl" not in shown and "its report" not in shown


def test_a_lora_that_is_not_prepared_is_not_trained(tmp_path):
    with pytest.raises(DataError, match="cups is not prepared: press Prepare in Data"):
        check_prepared(tmp_path, "cups", "cache/cups")
    put(tmp_path, Job(1, "prepare", ["conf=cups"]))
    check_prepared(tmp_path, "cups", "cache/cups")
    put(tmp_path, Job(1, "prepare", ["conf=cups"], state="done"), Job(2, "prepare", ["conf=cats"]))
    with pytest.raises(DataError, match="is not prepared"):
        check_prepared(tmp_path, "cups", "cache/cups")
    (tmp_path / "cache" / "cups").mkdir(parents=True)
    check_prepared(tmp_path, "cups", "cache/cups")


def test_the_button_train_checks_that(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = next(each.fn for each in build_page(tmp_path).fns.values() if each.api_name == "train")
    assert train is not None
    said, _ = train(True, "cups", *[""] * len(MAIN_KEYS), "")
    assert "cups is not prepared: press Prepare in Data." in said and not list_jobs(tmp_path)


def test_the_tick_to_replace_a_conf_is_for_one_save(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save = next(each.fn for each in build_page(tmp_path).fns.values() if each.api_name == "save_only")
    assert save is not None
    assert save(True, "cups", *[""] * len(MAIN_KEYS), "")[1] is False
    said, tick = save(True, "no name!", *[""] * len(MAIN_KEYS), "")
    assert "note error" in said and tick is not False


def test_the_plan_is_drawn_anew_when_a_job_has_ended(tmp_path):
    events = list(build_page(tmp_path).fns.values())
    look = next(each for each in events if each.targets[0][1] == "tick")
    plan = next(each for each in events if each.api_name == "check")
    assert look.fn

    def changed(before, after):
        parts = zip(look.outputs, before, after, strict=True)
        return {part._id for part, old, new in parts if old != new} & {target for target, _ in plan.targets}

    seen = [look.fn()]
    for job in (Job(1, "prepare", state="running", began=1.0), Job(1, "prepare", state="done", began=1.0, ended=2.0)):
        put(tmp_path, job)
        seen.append(look.fn())
    # A running job does not update the plan.
    assert not changed(*seen[:2]) and len(changed(*seen[1:])) == 1
