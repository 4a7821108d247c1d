import itertools
import json
import re

import pytest

from mochi_tune.config.load import load_config
from mochi_tune.config.sample import SampleConfig
from mochi_tune.errors import ConfigError
from mochi_tune.sampling.requests import ROW_KEYS, read_requests, sampler_settings
from mochi_tune.sampling.sampler import linear_quadratic_sigmas
from mochi_tune.training.preflight import check as check_training


def requests_of(folder, *settings):
    config = load_config("my_lora", ["model=tiny", *settings])
    return read_requests(config.sample, config.data, config.seed, folder / "run")


def rows(folder, *objects):
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(o if isinstance(o, str) else json.dumps(o) for o in objects))
    return f"sample.prompts={path}"


def test_a_text_file_has_one_prompt_a_line_and_each_seed_renders_it(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog runs  \n")
    found = requests_of(tmp_path, f"sample.prompts={tmp_path / 'p.txt'}", "sample.seeds=[3,4]")
    assert [(r.prompt, r.seed) for r in found] == [("a cat", 3), ("a cat", 4), ("a dog runs", 3), ("a dog runs", 4)]
    assert len({r.video for r in found}) == 4 and all(r.video.parent == tmp_path / "run" / "samples" for r in found)


def test_a_row_has_settings_of_its_own(tmp_path):
    own = {"prompt": "b", "seed": 9, "num_frames": 7, "steps": 4, "guidance": [3, 3, 1, 1], "negative_prompt": "n"}
    file = rows(tmp_path, {"prompt": "a"}, own, {"prompt": "c", "sigmas": [1, 0.5, 0]})
    plain, other, third = requests_of(tmp_path, file, "sample.guidance=2", f"sample.out={tmp_path}")
    assert (plain.seed, plain.num_frames, plain.settings.steps, plain.settings.scales[0]) == (0, 13, 64, 2)
    assert (other.seed, other.num_frames, other.negative_prompt) == (9, 7, "n")
    assert other.settings.scales == [3, 3, 1, 1] and other.is_guided
    assert third.settings.sigmas == [1, 0.5, 0] and third.settings.steps == 2
    assert plain.video.parent == tmp_path


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", r"row 2: not JSON"),
        ("[" * 100_000, r"row 2: not JSON that can be read"),
        ('{"prompt": "a cat \\ud83d"}', r"row 2: it holds half of a character, \\ud83d: write the whole character"),
        ('{"prompt": "a", "\\ud83d": 1}', r"row 2: it holds half of a character"),
        ({"seed": 1}, r"row 2: it has no prompt"),
        ({"prompt": "a", "colour": 1}, r"row 2: colour is not a key of a row: use prompt, negative_prompt, seed"),
        ({"prompt": "a", "steps": "4"}, r'row 2: steps="4" does not fit: it takes a whole number'),
        ({"prompt": "a", "num_frames": 8}, r"row 2: num_frames=8 does not fit the VAE"),
        ({"prompt": "a", "guidance": [1, 2]}, r"row 2: sample.guidance has 2 numbers for 64 steps"),
        ({"prompt": "a", "preset": "slow"}, r"row 2: sample.preset=slow is not possible: use quality or balanced"),
        ({"prompt": "a", "seed": -1}, r"row 2: seed=-1 is not possible"),
        ({"prompt": "a", "seed": 2**63}, r"row 2: seed=9223372036854775808 is not possible"),
        (
            {"prompt": "a", "init_video": "a.mp4", "init_strength": 2},
            r"row 2: sample.init_strength=2.0 is not possible",
        ),
        (
            {"prompt": "a", "init_strength": 0.5},
            r"row 2: sample.init_strength=0.5 does nothing without sample.init_video",
        ),
        (
            {"prompt": "a", "init_video": "nope.mp4"},
            r"row 2: sample.init_video=nope.mp4 does not exist: name a video or an image",
        ),
        ('{"prompt": "a", "seed": 1, "seed": 2}', r"row 2: seed is given twice: leave one out"),
        ({"prompt": "a", "steps": 10**12}, r"row 2: sample.steps=1000000000000 is not possible: .* from 1 to 10000"),
        (
            {"prompt": "a", "sigmas": [1, 0.5, 0], "threshold": 0.9, "linear_steps": 40},
            r"row 2: sample.threshold=0.9 and sample.linear_steps=40 do not fit sample.sigmas of 2 steps",
        ),
        ({"prompt": "a", "init_video": 3}, r"row 2: init_video=3 does not fit: it takes text"),
        ({"prompt": "a", "sigmas": [1, 0.5, 0.6, 0]}, r"row 2: sample.sigmas=.* give falling numbers from 1 to 0"),
    ],
)
def test_a_bad_row_is_named_by_its_number(tmp_path, row, said):
    with pytest.raises(ConfigError, match=said):
        requests_of(tmp_path, rows(tmp_path, {"prompt": "fine"}, row))


def test_files_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "p.csv").write_text("a")
    for name, said in (
        ("no.txt", "does not exist"),
        ("empty.txt", "has no prompts"),
        ("p.csv", r"not a \.txt or \.jsonl"),
    ):
        with pytest.raises(ConfigError, match=said):
            requests_of(tmp_path, f"sample.prompts={tmp_path / name}")
    with pytest.raises(ConfigError, match=r"^seed=9223372036854775808 is not possible"):
        requests_of(tmp_path, "sample.prompt=a", f"sample.seeds=[{2**63}]")
    with pytest.raises(ConfigError, match="2 videos are requested: name a folder"):
        requests_of(tmp_path, "sample.prompt=a", "sample.seeds=[1,2]", f"sample.out={tmp_path / 'x.mp4'}")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_not_part_of_a_prompt(tmp_path, encoding):
    (tmp_path / "p.txt").write_text("a cat\r\nKäse\r\n", encoding=encoding)
    assert [r.prompt for r in requests_of(tmp_path, f"sample.prompts={tmp_path / 'p.txt'}")] == ["a cat", "Käse"]


def test_a_prompt_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("Käse", encoding="cp1252")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        requests_of(tmp_path, f"sample.prompts={tmp_path / 'p.txt'}")


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\f", "\v", "\r", "\x1c"])
def test_a_prompt_of_a_text_file_ends_at_a_newline_alone(tmp_path, character):
    (tmp_path / "p.txt").write_bytes(f"a{character}cat\r\nb\n".encode())
    assert [r.prompt for r in requests_of(tmp_path, f"sample.prompts={tmp_path / 'p.txt'}")] == [
        f"a{character}cat",
        "b",
    ]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_a_character_that_json_allows_in_a_string_ends_no_row(tmp_path, character):
    file = rows(tmp_path, f'{{"prompt": "a{character}cat"}}', {"prompt": "b"})
    assert [r.prompt for r in requests_of(tmp_path, file)] == [f"a{character}cat", "b"]


def test_the_preset_of_a_row_replaces_the_schedule_of_the_command(tmp_path):
    file = rows(
        tmp_path, {"prompt": "a"}, {"prompt": "b", "preset": "fast"}, {"prompt": "c", "preset": "fast", "steps": 9}
    )
    found = requests_of(tmp_path, file, "sample.steps=30", "sample.guidance=2")
    assert [(r.settings.steps, r.settings.scales[0]) for r in found] == [(30, 2), (8, 1.5), (9, 1.5)]


def test_a_folder_may_have_a_dot_and_a_single_video(tmp_path):
    file = rows(tmp_path, {"prompt": "a"})
    for out in ("v1.5", "plain"):
        [request] = requests_of(tmp_path, file, f"sample.out={tmp_path / out}")
        assert request.video.parent == tmp_path / out and request.video.suffix == ".mp4"
    (tmp_path / "old.takes").mkdir()
    [request] = requests_of(tmp_path, file, f"sample.out={tmp_path / 'old.takes'}")
    assert request.video.parent == tmp_path / "old.takes"
    with pytest.raises(ConfigError, match=r"x\.avi has an unknown suffix"):
        requests_of(tmp_path, file, f"sample.out={tmp_path / 'x.avi'}")


def test_a_prompt_is_not_interpolated(tmp_path):
    [request] = requests_of(tmp_path, "sample.prompt=a ${seed} 'quoted' ${oc.env:HOME} cat")
    assert request.prompt == "a ${seed} 'quoted' ${oc.env:HOME} cat"


def test_videos_that_no_machine_will_render_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="13 frames of 100000x100000 are 117187500 visual tokens, the maximum is"):
        requests_of(tmp_path, "sample.prompt=x", "sample.height=100000", "sample.width=100000")


def settings_of(*settings):
    return sampler_settings(load_config("my_lora", [f"sample.{setting}" for setting in settings]).sample)


def test_sampler_settings_come_from_the_preset_and_override_it():
    assert settings_of().steps == 64
    fast = settings_of("preset=fast")
    assert (fast.steps, fast.guidance, fast.threshold, fast.linear_steps) == (8, 1.5, 0.1, 6)
    own = settings_of("preset=fast", "steps=4", "guidance=2")
    assert (own.steps, own.guidance, own.threshold, own.linear_steps) == (4, 2.0, 0.1, None)
    assert settings_of("preset=fast", "steps=8") == fast
    assert settings_of("preset=fastmochi", "steps=8") == settings_of("preset=fastmochi")
    other = settings_of("threshold=0.2", "linear_steps=3", "steps=9")
    assert (other.steps, other.guidance, other.threshold, other.linear_steps) == (9, 6.0, 0.2, 3)
    listed = settings_of("sigmas=[1,0.5,0]", "guidance=[3,1]")
    assert (listed.steps, listed.sigmas, listed.scales) == (2, [1, 0.5, 0], [3, 1])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["linear_steps=64"], "sample.linear_steps=64 does not fit sample.steps=64: use 1 to 63, or leave it out"),
        (["sigmas=[0,1]"], r"sample.sigmas=\[0.0, 1.0\] is not a schedule: give falling numbers from 1 to 0"),
        (["sigmas=[1]"], "is not a schedule"),
        (
            ["sigmas=[1,0]", "steps=2"],
            "sample.steps=2 does not fit sample.sigmas of 1 steps: leave steps out, or write steps=null where a conf",
        ),
        (["sigmas=[1,0.5,0]", "threshold=0.9"], "sample.threshold=0.9 does not fit sample.sigmas of 2 steps"),
        (["steps=1", "linear_steps=1"], r"linear_steps=1 does not fit sample.steps=1: leave it out\.$"),
        (["guidance=[1,2]"], "sample.guidance has 2 numbers for 64 steps: give one, or one for each step"),
        (
            ["threshold=0.2", "linear_steps=2"],
            r"sample.threshold=0.2 does not fit sample.steps=64, 2 of them linear: .* below 0 and rise again; use "
            r"sample.linear_steps=8 or more, or a sample.threshold of at most 0\.061\.$",
        ),
        (["steps=4", "threshold=0.9"], r"2 of them linear: .*linear_steps=3 or more, or .* at most 0\.749\.$"),
        (["preset=fast", "threshold=0.95"], r"6 of them .*linear_steps=7 or more, or .* at most 0\.899\.$"),
    ],
)
def test_a_schedule_that_does_not_fit_its_steps_is_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        settings_of(*settings)


def test_a_schedule_is_refused_exactly_where_its_levels_do_not_fall():
    for steps, linear, threshold in itertools.product(range(2, 14), range(1, 13), (0.03, 0.2, 0.45, 0.6, 0.77, 0.9)):
        if linear < steps:
            levels = linear_quadratic_sigmas(steps, threshold, linear)
            sample = SampleConfig(steps=steps, linear_steps=linear, threshold=threshold)
            if all(a > b for a, b in itertools.pairwise(levels)):
                assert sampler_settings(sample).sigmas == levels
                continue
            with pytest.raises(ConfigError) as refusal:
                sampler_settings(sample)
            # Both suggested settings are accepted, and the number of linear steps is the smallest possible.
            more, less = re.findall(r"linear_steps=(\d+) or more, or .* at most (\S+)\.$", str(refusal.value))[0]
            for change in ({"linear_steps": int(more)}, {"threshold": float(less)}):
                assert sampler_settings(sample.model_copy(update=change))
            with pytest.raises(ConfigError):
                sampler_settings(sample.model_copy(update={"linear_steps": int(more) - 1}))


def test_each_preset_takes_any_usual_number_of_steps():
    for preset in ("quality", "balanced", "fast"):
        assert sampler_settings(SampleConfig(preset=preset))
        for steps in range(2, 201):
            sigmas = sampler_settings(SampleConfig(preset=preset, steps=steps)).sigmas
            assert len(sigmas) == steps + 1 and all(a > b for a, b in itertools.pairwise(sigmas))
    assert sampler_settings(SampleConfig(preset="fastmochi"))


def test_train_refuses_the_schedule_of_its_eval_videos_before_it_looks_for_weights(tmp_path):
    own = [f"model.weights={tmp_path / 'none'}", "device=cpu", "sample.threshold=0.9", "sample.steps=4"]
    with pytest.raises(ConfigError, match=r"threshold=0\.9 does not fit"):
        check_training(load_config("my_lora", own), 1)


def test_a_preset_that_is_given_replaces_the_files_own_schedule():
    toy = load_config("toy_lora", []).sample
    assert (toy.steps, toy.threshold) == (24, 0.2)
    fast = load_config("toy_lora", ["sample.guidance=2", "sample.preset=fast"]).sample
    assert (fast.preset, fast.steps, fast.threshold, fast.guidance) == ("fast", None, None, 2)


def test_the_advice_for_a_conf_with_steps_works():
    own = ["sample.sigmas=[1,0.5,0]"]
    with pytest.raises(ConfigError, match="leave steps and threshold out, or write steps=null threshold=null where"):
        sampler_settings(load_config("toy_lora", own).sample)
    nulls = ["sample.steps=null", "sample.threshold=null"]
    assert sampler_settings(load_config("toy_lora", [*own, *nulls]).sample).sigmas == [1, 0.5, 0]


def test_the_sigmas_of_a_row_replace_the_schedule_of_the_command_and_vice_versa(tmp_path):
    file = rows(tmp_path, {"prompt": "a", "sigmas": [1, 0.5, 0]}, {"prompt": "b"})
    own, common = requests_of(tmp_path, file, "sample.steps=9", "sample.threshold=0.2", "sample.linear_steps=3")
    assert own.settings.sigmas == [1, 0.5, 0]
    assert (common.settings.steps, common.settings.threshold, common.settings.linear_steps) == (9, 0.2, 3)
    file = rows(tmp_path, {"prompt": "a", "threshold": 0.2}, {"prompt": "b"})
    own, common = requests_of(tmp_path, file, "sample.sigmas=[1,0.5,0]")
    assert (own.settings.steps, own.settings.threshold, common.settings.sigmas) == (64, 0.2, [1, 0.5, 0])


def test_an_unknown_suffix_is_reported_before_an_existing_file(tmp_path):
    (tmp_path / "circle.json").touch()
    with pytest.raises(ConfigError, match=r"circle\.avi has an unknown suffix"):
        requests_of(tmp_path, "sample.prompt=a", f"sample.out={tmp_path / 'circle.avi'}")
    with pytest.raises(ConfigError, match=r"circle\.json exists and is never overwritten"):
        requests_of(tmp_path, "sample.prompt=a", f"sample.out={tmp_path / 'circle.mp4'}")


def test_the_keys_of_a_row_are_settings_of_the_sampler():
    assert ROW_KEYS.keys() - {"seed"} <= SampleConfig.model_fields.keys()


def test_a_name_that_is_too_long_for_the_files_next_to_it_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="the name has 244 bytes: use at most 220"):
        requests_of(tmp_path, "sample.prompt=a cat", f"sample.out={tmp_path / ('n' * 240)}.mp4")


def test_a_row_with_a_seed_of_its_own_is_one_video_whatever_the_seeds(tmp_path):
    own = rows(tmp_path, {"prompt": "a cat", "seed": 3})
    [request] = requests_of(tmp_path, own, "sample.seeds=[0,1]", f"sample.out={tmp_path}/one.mp4")
    assert request.seed == 3 and request.video.name == "one.mp4"
