import pytest
from helpers_hub import UploadHub
from helpers_road import road

from mochi_tune.cli.main import run


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    hub = UploadHub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    yield hub
    hub.close()


def test_a_run_without_its_last_evaluation_says_that_nothing_was_uploaded(tmp_path, hub, capsys):
    settings = road(tmp_path / "run", "publish.push=ada/balls")
    assert run(["train", "conf=my_lora", *settings], recipe=lambda _config, _processes: 2) == 2
    said = "nothing was uploaded, the same command uploads the adapter when it has completed the run"
    assert capsys.readouterr().err.splitlines()[-1] == f"mochi-tune: publish.push=ada/balls: {said}" and not hub.files
