"""The form of `sample` reports the errors of the command line; the record of a video fills in the form for it."""

import json
import os

import pytest
from helpers_calls import count_calls
from helpers_jobs import put
from helpers_renders import write_adapter

from mochi_tune.config.load import load_config
from mochi_tune.errors import ConfigError, DataError, MochiTuneError
from mochi_tune.recipes.sample import main as sample
from mochi_tune.sampling.adapters import check_has_adapter
from mochi_tune.ui.confs import Form, save_conf
from mochi_tune.ui.jobs import Job
from mochi_tune.ui.renders import BASE, SampleForm, arguments_of, find_render, form_of, list_renders

FORM = SampleForm(
    'it\'s a "cup" \\ for $x',
    "blur",
    "3 5",
    {"num_frames": "7", "height": "32", "width": "48", "steps": "2"},
    (("loras/a b.safetensors", "0.5"), ("loras/c.safetensors", "")),
    more="guidance=2.5\n# a remark",
)


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_conf(tmp_path, Form("cups", {"model": "tiny"}, "device=cpu"), replaces=False)
    (tmp_path / "loras").mkdir()
    write_adapter(tmp_path / "loras" / "a b.safetensors", 1)
    write_adapter(tmp_path / "loras" / "c.safetensors", 2)


def config_of(arguments):
    assert arguments[0] == "conf=cups"
    return load_config("cups", [f"sample.{each}" for each in arguments[1:]])


def test_a_video_is_rendered_again_by_its_record(tmp_path):
    arguments = arguments_of(tmp_path, "cups", FORM)
    asked = config_of(arguments).sample
    assert (asked.prompt, asked.negative_prompt, asked.seeds) == ('it\'s a "cup" \\ for $x', "blur", [3, 5])
    assert asked.adapter == ["loras/a b.safetensors", "loras/c.safetensors"] and asked.adapter_strength == [0.5, 1]
    list(sample(config_of(arguments)))
    renders = list_renders(tmp_path)
    assert {render.record["seed"] for render in renders} == {3, 5}
    once = renders[0]
    list(sample(config_of(arguments_of(tmp_path, "cups", form_of(tmp_path, once.record)))))
    newest = list_renders(tmp_path)[0]
    assert newest.video != once.video and newest.video.with_suffix(".json").exists()
    of_time = ("seconds", "peak_gib")
    assert {k: v for k, v in newest.record.items() if k not in of_time} == {
        k: v for k, v in once.record.items() if k not in of_time
    }


def test_every_kind_of_render_is_as_the_command_line_takes_it(tmp_path):
    grid = SampleForm("a\nb", kind="grid", strengths="0 1", checkpoints="all", seeds="0,1")
    asked = config_of(arguments_of(tmp_path, "cups", grid)).sample
    assert asked.grid and (asked.strengths, asked.checkpoints, asked.seeds) == ([0, 1], "all", [0, 1])
    assert (tmp_path / asked.prompts).read_text() == "a\nb\n"
    one = SampleForm("a", adapters=(("loras/c.safetensors", "0.8"),), kind="compare")
    asked = config_of(arguments_of(tmp_path, "cups", one)).sample
    assert (asked.compare, asked.adapter, asked.adapter_strength) == ("base", "loras/c.safetensors", 0.8)
    base = config_of(arguments_of(tmp_path, "cups", SampleForm("a", adapters=((BASE, ""),)))).sample
    assert base.adapter == [] and base.adapter_strength == 1, "which needs no trained run"


def test_the_base_takes_no_setting_of_adapters_from_the_conf(tmp_path):
    conf = tmp_path / "conf" / "cups.yaml"
    own = "sample: {strength_schedule: [1, 0], block_strength: {0-0: 0.5}, adapter_alpha: 16}\n"
    conf.write_text(conf.read_text() + own)
    base = config_of(arguments_of(tmp_path, "cups", SampleForm("a", adapters=((BASE, ""),))))
    check_has_adapter(base.sample, tmp_path)
    assert (base.sample.strength_schedule, base.sample.block_strength, base.sample.adapter_alpha) == (None, {}, None)


def test_no_choice_is_the_adapter_of_the_run_with_its_strength(tmp_path):
    with pytest.raises(ConfigError, match="cups is not trained yet: choose an adapter, or none: the base"):
        arguments_of(tmp_path, "cups", SampleForm("a"))
    put(tmp_path, Job(1, "train", ["conf=cups"]))
    assert arguments_of(tmp_path, "cups", SampleForm("a")) == ["conf=cups", "prompt=a"], "the training ends first"
    put(tmp_path, Job(1, "train", ["conf=cups"], state="failed"))
    (tmp_path / "runs" / "cups_tiny").mkdir(parents=True)
    (tmp_path / "runs" / "cups_tiny" / "adapter.safetensors").touch()
    for strength, given in (("", []), ("1", []), (" 0.5 ", ["adapter_strength=0.5"]), ("0", ["adapter_strength=0"])):
        form = SampleForm("a", adapters=(("", strength),))
        assert arguments_of(tmp_path, "cups", form) == ["conf=cups", "prompt=a", *given]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": " \n"}, "prompt is empty"),
        ({"seeds": "x"}, "seeds=x does not fit"),
        ({"sizes": {"num_frames": "8"}}, "8"),
        ({"adapters": (("gone.safetensors", "1"),)}, "gone.safetensors does not exist"),
        ({"adapters": (("../a.safetensors", "1"),)}, "outside of"),
        ({"adapters": (("loras/c.safetensors", "strong"),)}, "adapter_strength=strong does not fit"),
        ({"adapters": (("", "nan"),)}, "adapter_strength=nan does not fit"),
        ({"adapters": (("", "1"), ("loras/c.safetensors", "1"))}, "the run's own adapter takes no others beside it"),
        ({"adapters": ((BASE, ""),), "kind": "compare"}, "nothing to compare it with: choose an adapter"),
        ({"adapters": ((BASE, ""),), "kind": "grid", "strengths": "0 1"}, "the base has no strengths"),
        ({"kind": "grid", "checkpoints": "last"}, "checkpoints=last does not fit"),
        ({"more": "steps=3"}, "steps has a separate field"),
        ({"more": "guidence=3"}, "did you mean guidance"),
        ({"more": "guidance=3\nsample.guidance=2"}, "guidance is given twice"),
        ({"more": "init_video=../film.mp4"}, "outside of"),
        ({"more": "prompt_cache=../features"}, "outside of"),
        ({"more": "train.steps=3"}, "is not a setting of `sample`"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_queued(tmp_path, change, message):
    values = {"prompts": "a"} | change
    with pytest.raises(MochiTuneError, match=message):
        arguments_of(tmp_path, "cups", SampleForm(**values))
    assert not (tmp_path / ".mochi_tune").exists()


def test_what_is_no_video_with_settings_is_left_out(tmp_path):
    folder = tmp_path / "runs" / "x" / "samples"
    folder.mkdir(parents=True)
    (folder / "a.mp4").touch()
    (folder / "b.json").write_text(json.dumps({"prompt": "b"}))
    for name, text in (("c", "{"), ("d", "[]"), ("e", json.dumps({"prompt": 1}))):
        (folder / f"{name}.mp4").touch()
        (folder / f"{name}.json").write_text(text)
    strengths = [{"adapters": [{"strength": each}]} for each in (None, float("inf"), float("nan"))]
    for number, more in enumerate(({"adapters": ["a"]}, {"sampler": "euler"}, *strengths)):
        (folder / f"foreign_{number}.mp4").touch()
        (folder / f"foreign_{number}.json").write_text(json.dumps({"prompt": "z", **more}))
    elsewhere = tmp_path.parent / f"{tmp_path.name}_elsewhere" / "samples"
    elsewhere.mkdir(parents=True)
    (elsewhere / "a.mp4").touch()
    (elsewhere / "a.json").write_text(json.dumps({"prompt": "a"}))
    (tmp_path / "runs" / "linked").symlink_to(elsewhere.parent)
    assert list_renders(tmp_path) == []
    with pytest.raises(ConfigError, match="is not a setting"):
        arguments_of(tmp_path, "cups", SampleForm("a", more="nonsense"))


def test_links_are_listed_and_found(tmp_path):
    samples, kept = tmp_path / "runs" / "x" / "samples", tmp_path / "videos" / "kept.mp4"
    for path in (samples, kept.parent):
        path.mkdir(parents=True)
    kept.touch()
    (samples / "link.mp4").symlink_to(kept)
    (samples / "link.json").write_text(json.dumps({"prompt": "a", "adapters": [], "sampler": {}}))
    # A link that leads to itself hides no video.
    (samples / "loop.json").symlink_to("loop.json")
    [render] = list_renders(tmp_path)
    assert render.video.name == "link.mp4"
    assert find_render(tmp_path, "videos/kept.mp4") == render


def test_the_records_of_many_videos_are_read_once(tmp_path):
    samples = tmp_path / "runs" / "x" / "samples"
    samples.mkdir(parents=True)

    def write(name, record):
        (samples / f"{name}.mp4").touch()
        (samples / f"{name}.json").write_text(json.dumps(record))

    def found():
        with count_calls(open) as calls:
            names = {render.video.stem for render in list_renders(tmp_path)}
        return names, calls["open"]

    for name in "abc":
        write(name, {"prompt": name})
    assert found() == ({"a", "b", "c"}, 3) and found() == ({"a", "b", "c"}, 0)
    write("d", {"prompt": "d"})
    write("a", {"prompt": ["of another program"]})
    assert found() == ({"b", "c", "d"}, 2)
    render = find_render(tmp_path, "runs/x/samples/d.mp4")
    assert render.record == {"prompt": "d"}
    os.utime(samples / "c.mp4", (1, 1))
    assert list_renders(tmp_path)[-1].video.stem == "c", "the newest are first"
    again = list_renders(tmp_path)[0]
    again.video.with_suffix(".json").unlink()
    assert again.record == {}
    for name, why in (("a", "does not exist any"), ("e", "does not exist any"), ("../../../../e", "outside of")):
        with pytest.raises(DataError, match=why):
            find_render(tmp_path, f"runs/x/samples/{name}.mp4")


@pytest.mark.parametrize(
    ("sampler", "more"),
    [
        ({"steps": 4, "guidance": [1.0, 2.0, 3.0, 4.0], "threshold": 0.2}, "guidance=[1.0, 2.0, 3.0, 4.0]"),
        ({"steps": 64, "guidance": 6.0, "threshold": 0.025, "guided": [0.0, 0.75]}, "preset=balanced"),
        ({"steps": 2, "guidance": 1.5, "own_sigmas": [1.0, 0.5, 0.0]}, "sigmas=[1.0, 0.5, 0.0]"),
    ],
)
def test_a_schedule_of_its_own_comes_back(tmp_path, sampler, more):
    form = form_of(tmp_path, {"prompt": "a", "seed": 1, "sampler": sampler})
    assert more in form.more.splitlines() and form.adapters == ((BASE, ""),)
    arguments_of(tmp_path, "cups", form)


def test_all_that_a_record_says_comes_back(tmp_path):
    first = {"file": "loras/c.safetensors", "strength": 2.0, "block_strength": {"0": 0.5}}
    record = {
        "prompt": "a\nb", "negative_prompt": "blur", "seed": 4, "num_frames": 7, "height": 32, "width": 48,
        "sampler": {"steps": 2}, "adapters": [first, {"file": "loras/a b.safetensors", "strength": 0.5}],
        "init_video": {"file": "start.mp4", "strength": 0.5}, "side_by_side": ["base", "adapted"],
    }  # fmt: skip
    start = "init_video=start.mp4\ninit_strength=0.5"
    assert form_of(tmp_path, record) == SampleForm(
        "a b", "blur", "4", FORM.sizes, (("loras/c.safetensors", "2"), ("loras/a b.safetensors", "0.5")),
        "compare", more=f"block_strength=[{{0: 0.5}}, {{}}]\n{start}",
    )  # fmt: skip
    alone = {"file": "loras/c.safetensors", "strength_schedule": [0.5, 1]}
    assert form_of(tmp_path, record | {"adapters": [alone]}).more == f"strength_schedule=[0.5, 1]\n{start}"
