import json

import pytest

from mochi_tune.toy.guidance import WINDOWS, main


def test_every_window_is_rendered_and_no_guidance_takes_half_the_passes(tmp_path):
    lines = main(1, tmp_path, "sample.steps=4", num_samples=1).splitlines()
    assert len(lines) == 2 + len(WINDOWS) and lines[2].startswith("| all steps | 100% |") and "| 50% |" in lines[-1]
    rows = json.loads((tmp_path / "guidance.json").read_text())
    changed = {name: measured[0][1] for name, measured in rows.items()}
    assert changed["all steps"] == 0 and all(value > 0 for name, value in changed.items() if name != "all steps")


def test_a_folder_that_cannot_be_made_is_known_before_anything_is_rendered(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("mochi_tune.toy.guidance.render_words", lambda *_: pytest.fail("it rendered"))
    with pytest.raises(OSError, match="file"):
        main(1, tmp_path / "file", num_samples=1)
