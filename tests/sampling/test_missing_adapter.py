from pathlib import Path

from mochi_tune.config.sample import SampleConfig
from mochi_tune.sampling.adapters import missing_adapter


def test_a_rendering_without_an_adapter_names_what_is_missing(tmp_path):
    nowhere: Path = tmp_path / "rnus"
    assert f"there is no folder {nowhere}: train first" in missing_adapter(SampleConfig(), nowhere)
    assert f"{tmp_path} has no adapter.safetensors" in missing_adapter(SampleConfig(), tmp_path)
    assert missing_adapter(SampleConfig(adapter=[]), nowhere) == "no adapter: the base"
