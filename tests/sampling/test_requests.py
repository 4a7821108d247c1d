import json

import pytest

from mochi_tune.config.load import load_config
from mochi_tune.errors import ConfigError
from mochi_tune.sampling.requests import read_requests


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
        ({"seed": 1}, r"row 2: it has no prompt"),
        ({"prompt": "a", "colour": 1}, r"row 2: colour is not a key of a row, which are prompt, negative_prompt, seed"),
        ({"prompt": "a", "steps": "4"}, r'row 2: steps="4" does not fit: it takes a whole number'),
        ({"prompt": "a", "num_frames": 8}, r"row 2: num_frames=8 does not fit the VAE"),
        ({"prompt": "a", "guidance": [1, 2]}, r"row 2: sample.guidance has 2 numbers for 64 steps"),
        ({"prompt": "a", "preset": "slow"}, r"row 2: sample.preset=slow is not possible: use quality or fast"),
        ({"prompt": "a", "seed": -1}, r"row 2: seed=-1 is not possible"),
        ({"prompt": "a", "sigmas": [1, 0.5, 0.6, 0]}, r"row 2: sample.sigmas=.* give falling numbers from 1 to 0"),
    ],
)
def test_a_bad_row_is_named_by_its_number(tmp_path, row, said):
    with pytest.raises(ConfigError, match=said):
        requests_of(tmp_path, rows(tmp_path, {"prompt": "fine"}, row))


def test_files_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "p.csv").write_text("a")
    for name, said in (
        ("no.txt", "does not exist"),
        ("empty.txt", "has no prompts"),
        ("p.csv", r"no \.txt or \.jsonl"),
    ):
        with pytest.raises(ConfigError, match=said):
            requests_of(tmp_path, f"sample.prompts={tmp_path / name}")
    with pytest.raises(ConfigError, match="2 videos are asked for: name a folder"):
        requests_of(tmp_path, "sample.prompt=a", "sample.seeds=[1,2]", f"sample.out={tmp_path / 'x.mp4'}")


def test_a_mark_of_byte_order_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n", encoding="utf-8-sig")
    assert [r.prompt for r in requests_of(tmp_path, f"sample.prompts={tmp_path / 'p.txt'}")] == ["a cat"]


def test_a_rows_preset_stands_in_the_place_of_the_commands_schedule(tmp_path):
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
    with pytest.raises(ConfigError, match=r"x\.avi is not an \.mp4 file"):
        requests_of(tmp_path, file, f"sample.out={tmp_path / 'x.avi'}")


def test_a_prompt_is_taken_word_by_word(tmp_path):
    [request] = requests_of(tmp_path, "sample.prompt=a ${seed} 'quoted' ${oc.env:HOME} cat")
    assert request.prompt == "a ${seed} 'quoted' ${oc.env:HOME} cat"


def test_videos_that_no_machine_will_render_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"13 frames of 100000x100000 are 117187500 tokens, the most is 445200"):
        requests_of(tmp_path, "sample.prompt=x", "sample.height=100000", "sample.width=100000")
