"""A sample's caption, and the replacement of its clip if that is damaged, depend only on the step and the sample."""

import pytest
import torch

from mochi_tune.data.order import ClipOrder, ClipPool
from mochi_tune.errors import ConfigError, DataError
from mochi_tune.training.draws import KeyedDraws
from mochi_tune.training.loader import ClipLoader, Prefetcher, check_replacing


class Clips:
    """Three clips with a million captions each. The first clip is damaged. Features hold the number of a caption."""

    def num_captions(self, _index: int) -> int:
        return 10**6

    def load(self, index: int, caption: int) -> dict:
        if index == 0:
            raise DataError("the clip is damaged")
        latents, features = torch.zeros(1, 1, 1, 1), torch.tensor([[float(caption)]])
        return {"mean": latents, "logvar": latents, "prompt_embeds": features, "sample_id": index}


def load_steps(batch_size: int, num_micro_batches: int) -> list[list[tuple[int, int, float]]]:
    """Returns the samples of 12 steps: the clip that is due, the clip that is loaded and the number of its caption."""
    order = ClipOrder((ClipPool("", (0, 1, 2), 3),), batch_size, 0)
    draws = KeyedDraws(0, batch_size, num_micro_batches, 0.0, False)
    loader, steps = ClipLoader(Clips(), order, draws, False, lambda _: None), []
    for step in range(1, 13):
        steps.append([])
        for micro_batch in range(num_micro_batches):
            batch, _ = loader.load(step, micro_batch)
            due = order.batch(draws.batch_number(step, micro_batch))
            steps[-1] += zip(due, batch["sample_ids"], batch["prompt_embeds"].flatten().tolist(), strict=True)
    return steps


@pytest.fixture(scope="module")
def steps():
    return load_steps(6, 1)


@pytest.mark.parametrize(("batch_size", "num_micro_batches"), [(3, 2), (1, 6)])
def test_samples_do_not_depend_on_the_micro_batches(steps, batch_size, num_micro_batches):
    assert load_steps(batch_size, num_micro_batches) == steps


def test_every_sample_of_every_step_has_another_caption(steps):
    captions = [caption for samples in steps for *_, caption in samples]
    assert len(set(captions)) == len(captions) == 12 * 6


def test_the_replacement_of_a_damaged_clip_differs_by_step_and_by_sample(steps):
    replacements = {
        (step, sample): loaded
        for step, samples in enumerate(steps)
        for sample, (due, loaded, _) in enumerate(samples)
        if due == 0
    }
    assert len(replacements) == 12 * 2 and all(loaded == due for each in steps for due, loaded, _ in each if due)
    for key in (0, 1):
        by_key: dict[int, set[int]] = {}
        for place, loaded in replacements.items():
            by_key.setdefault(place[key], set()).add(loaded)
        assert {1, 2} in by_key.values()


def test_processes_that_compute_a_clip_together_replace_none():
    check_replacing("quarantine", "zero2", 1)
    check_replacing("strict", "zero3", 2)
    for strategy, context in (("data", 2), ("zero3", 1)):
        with pytest.raises(ConfigError, match=r"data\.damaged=quarantine needs parallel\.context=1 and"):
            check_replacing("quarantine", strategy, context)


def test_what_fails_before_the_first_micro_batch_ends_the_wait_for_it():
    def refuse():
        raise RuntimeError("the GPU is gone")

    def give_up():
        raise TimeoutError("the thread reported nothing")

    prefetcher = Prefetcher(pytest.fail, [(1, 0)], torch.device("cpu"))
    prefetcher._copier.enter_thread = refuse
    with prefetcher, pytest.raises(RuntimeError, match="the GPU is gone"):
        next(prefetcher.take(1, give_up))
