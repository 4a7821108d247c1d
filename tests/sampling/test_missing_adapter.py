import pytest

from mochi_tune.config.sample import SampleConfig
from mochi_tune.errors import CheckpointError
from mochi_tune.sampling.adapters import check_has_adapter, find_adapters


@pytest.mark.parametrize(("name", "text"), [("nowhere", "there is no folder"), ("", "has no adapter.safetensors")])
def test_a_run_without_an_adapter_is_refused_and_the_way_to_the_base_named(tmp_path, name, text):
    with pytest.raises(CheckpointError, match=f"{text}.*adapter=none") as refusal:
        check_has_adapter(SampleConfig(), tmp_path / name)
    assert str(tmp_path / name) in str(refusal.value)


def test_none_is_the_base(tmp_path):
    base = SampleConfig(adapter="none")
    check_has_adapter(base, tmp_path / "nowhere")
    assert find_adapters(base, tmp_path / "nowhere") == []


def test_an_adapter_that_is_named_or_in_the_run_is_accepted(tmp_path):
    check_has_adapter(SampleConfig(adapter="a.safetensors"), tmp_path)
    check_has_adapter(SampleConfig(checkpoints=[1]), tmp_path)
    (tmp_path / "adapter.safetensors").touch()
    check_has_adapter(SampleConfig(), tmp_path)
