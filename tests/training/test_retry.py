"""A micro-batch that ran out of memory is repeated with blocks that keep less, with the same results."""

import functools
from pathlib import Path

import pytest
import torch
from helpers_parallel import run_ranks
from helpers_road import LORA, read_rows, road, train
from safetensors.torch import load_file

from mochi_tune.config.load import load_config
from mochi_tune.errors import TrainingError
from mochi_tune.recipes import train_lora
from mochi_tune.training import memory_plan

MORE = ["train.steps=3", "train.warmup_steps=0", "train.learning_rate=1e-2", "train.recompute=auto"]
# Two micro-batches per step: when the second one fails, the gradients of the first one exist.
ACCUMULATED = [*MORE, "train.accumulation_steps=2"]


def no_memory(gradient: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")


def fail_at(monkeypatch, calls: set[int]) -> list[int]:
    """Makes the backward passes of some micro-batches fail near their end; returns a list of all micro-batches."""
    find_parameters, velocity_loss = train_lora.lora_parameters, train_lora.velocity_loss
    parameters, made = {}, []

    def lora_parameters(dit):
        parameters.update(find_parameters(dit))
        return find_parameters(dit)

    def failing_loss(velocity, target):
        made.append(len(made))
        if made[-1] in calls:
            first = next(iter(parameters.values()))
            # At this point, all gradients exist except for one layer of the first block.
            hook = first.register_hook(lambda gradient: (hook.remove(), no_memory(gradient)))
        return velocity_loss(velocity, target)

    monkeypatch.setattr(train_lora, "lora_parameters", lora_parameters)
    monkeypatch.setattr(train_lora, "velocity_loss", failing_loss)
    return made


def assert_same_run(ours: Path, theirs: Path) -> None:
    losses = [[row["loss"] for row in read_rows(folder / "metrics.jsonl")] for folder in (ours, theirs)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    adapters = [load_file(folder / "adapter.safetensors") for folder in (ours, theirs)]
    assert all(torch.equal(adapters[0][name], tensor) for name, tensor in adapters[1].items())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(folder, *ACCUMULATED) == 0
    return folder


@pytest.mark.parametrize("more", [[], ["memory=12gb", "train.recompute=auto"]], ids=["resident", "12gb"])
def test_a_step_that_ran_out_of_memory_is_made_again_to_the_same_bits(more, undisturbed, tmp_path, monkeypatch, capsys):
    # The second micro-batch of step 2.
    made = fail_at(monkeypatch, {3})
    assert train(tmp_path / "run", *ACCUMULATED, *more) == 0
    assert len(made) == 7
    assert capsys.readouterr().out.count("out of memory (CUDA out of memory): from here on all blocks") == 1
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    ("calls", "more", "num_calls"),
    [({1, 2}, [], 3), ({1}, ["train.recompute=block"], 2), ({1}, ["train.recompute=attention"], 2)],
    ids=["twice", "nothing less to keep", "not asked for"],
)
def test_where_nothing_less_can_be_kept_it_is_an_error(calls, more, num_calls, tmp_path, monkeypatch):
    made = fail_at(monkeypatch, calls)
    with pytest.raises(TrainingError, match="does not suffice in the backward pass of a step") as error:
        train(tmp_path, *MORE, *more)
    assert len(made) == num_calls
    # The error does not recommend what was already tried.
    assert ("train.recompute=block" in str(error.value)) == (more == ["train.recompute=attention"])


def train_in_a_rank(arguments: list[str], failing_rank: int | None) -> int:
    """Returns the number of micro-batches that this rank started."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        is_failing = torch.distributed.get_rank() == failing_rank
        made = fail_at(monkeypatch, {1} if is_failing else set())
        train_lora.main(load_config("my_lora", arguments), 2)
        return len(made)


def test_of_two_processes_one_makes_its_part_of_a_step_again(tmp_path):
    counts = []
    for name, failing_rank in (("alone", None), ("run", 1)):
        (tmp_path / f"ranks_{name}").mkdir()
        arguments = road(tmp_path / name, *LORA, *MORE)
        counts.append(run_ranks(2, train_in_a_rank, tmp_path / f"ranks_{name}", arguments, failing_rank))
    assert counts == [[3, 3], [3, 4]]
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def test_compiled_blocks_are_compiled_anew(tmp_path, monkeypatch):
    # Graphs of which torch runs the operations as they are; it draws dropout otherwise then.
    compiled = functools.partial(memory_plan.apply_compilation, backend="eager")
    monkeypatch.setattr(memory_plan, "apply_compilation", compiled)
    assert train(tmp_path / "alone", *MORE, "lora.dropout=0", "train.compile=true") == 0
    made = fail_at(monkeypatch, {1})
    assert train(tmp_path / "run", *MORE, "lora.dropout=0", "train.compile=true") == 0
    assert len(made) == 4
    assert_same_run(tmp_path / "run", tmp_path / "alone")
