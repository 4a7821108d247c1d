"""Where `sample` compiles the blocks by itself."""

from helpers_road import road

from mochi_tune.config.load import load_config
from mochi_tune.parallel.memory import PRECISIONS, RESIDENCIES
from mochi_tune.recipes import sample as recipe
from mochi_tune.sampling.requests import read_requests


def test_blocks_are_compiled_where_the_steps_pay_for_it(tmp_path):
    def pays(*more, num_variants=1, residency="fp8"):
        settings = ["prompt=a cat", "height=480", "width=848", *more]
        config = load_config("my_lora", road(tmp_path, *(f"sample.{s}" for s in settings)))
        requests = read_requests(config.sample, config.data, 0, tmp_path)
        return recipe.pays_to_compile(residency, requests, num_variants)

    assert pays("num_frames=163") and not pays("num_frames=37")
    # Two videos side by side, or several, pay for it too.
    assert pays("num_frames=37", num_variants=2) and pays("num_frames=37", "seeds=[0,1]")
    assert not pays("num_frames=163", "preset=fast")
    # Only 8 bits are faster when they are compiled; with weights in host memory their copies take the time.
    assert all(pays("num_frames=163", residency=each) for each in PRECISIONS)
    assert not any(pays("num_frames=163", residency=each) for each in set(RESIDENCIES) - set(PRECISIONS))
