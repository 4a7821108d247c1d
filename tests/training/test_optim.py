import copy
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mochi_tune.config.settings import known_keys
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.training.optim import (
    RUNNING,
    build_adamw,
    build_optimizer,
    check_installed,
    inference_weights,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
    temporarily,
)

A, B, MAGNITUDE = "blocks.0.attn.qkv_x.lora_A", "blocks.0.attn.qkv_x.lora_B", "blocks.0.attn.qkv_x.lora_magnitude"
RATE = {"prodigy": 1.0}
# Half a run: Prodigy's d moves only after some steps.
HALF = {"prodigy": 40}
# Entries of the parameter groups that the libraries change.
NOTES = {"lr", "d_hat", "d_denom", "scheduled_lr"}
OPTIMIZERS = known_keys()["train.optimizer"].choices
WITH_VECTORS = [name for name in OPTIMIZERS if name != "muon"]


class Problem:
    """An adapter that learns to match a matrix. A is large enough for 8-bit state (4096), B is not and starts at 0."""

    def __init__(self, name, b_ratio=1.0, weight_decay=0.01, vector=False, gradient_scale=1.0):
        generator = torch.Generator().manual_seed(0)
        self.parameters = {
            A: nn.Parameter(torch.randn(8, 600, generator=generator)),
            B: nn.Parameter(torch.zeros(20, 8)),
        }
        if vector:
            self.parameters[MAGNITUDE] = nn.Parameter(torch.ones(20))
        self.target = torch.randn(20, 600, generator=generator)
        self.rate, self.gradient_scale = RATE.get(name, 1e-2), gradient_scale
        self.optimizer = build_optimizer(name, self.parameters, self.rate, weight_decay, b_ratio, "cpu")

    def loss(self):
        a, b, *magnitude = self.parameters.values()
        return ((b @ a) * (magnitude[0][:, None] if magnitude else 1) - self.target).square().mean()

    def step(self, number):
        # The learning rate changes, as with a schedule.
        set_learning_rate(self.optimizer, self.rate * (1 + number % 8) / 8)
        (self.loss() * self.gradient_scale).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def steps(self, *numbers):
        for number in numbers:
            self.step(number)
        return self

    def state(self):
        return optimizer_state(self.optimizer, self.parameters)


def assert_same(one: Problem, other: Problem):
    for name, parameter in one.parameters.items():
        assert torch.equal(parameter, other.parameters[name]), name
    (state, groups), (other_state, other_groups) = one.state(), other.state()
    assert groups == other_groups and state.keys() == other_state.keys()
    for name, entries in state.items():
        assert entries.keys() == other_state[name].keys()
        for key, tensor in entries.items():
            found = other_state[name][key]
            assert tensor.dtype == found.dtype and torch.equal(tensor, found), f"{name}/{key}"


def through_files(folder, state, groups):
    save_file({f"{name}/{key}": t for name, entries in state.items() for key, t in entries.items()}, folder / "state")
    (folder / "groups").write_text(json.dumps(groups, allow_nan=False))
    read: dict = {}
    for key, tensor in load_file(folder / "state").items():
        name, _, entry = key.rpartition("/")
        read.setdefault(name, {})[entry] = tensor
    return read, json.loads((folder / "groups").read_text())


def resumed(problem: Problem, folder, *arguments, **settings) -> Problem:
    new = Problem(*arguments, **settings)
    for name, parameter in new.parameters.items():
        parameter.data.copy_(problem.parameters[name])
    load_optimizer_state(new.optimizer, new.parameters, *through_files(folder, *problem.state()))
    return new


@pytest.mark.parametrize(
    ("name", "b_ratio"),
    [(name, ratio) for name in OPTIMIZERS for ratio in (1.0, 4.0) if (name, ratio) != ("prodigy", 4.0)],
)
def test_a_resumed_run_goes_on_bit_for_bit(name, b_ratio, tmp_path):
    settings = {"b_ratio": b_ratio, "vector": name in WITH_VECTORS}
    first_steps, last_steps = range(HALF.get(name, 3)), range(HALF.get(name, 3), 2 * HALF.get(name, 3))
    straight = Problem(name, **settings).steps(*first_steps, *last_steps)
    half = Problem(name, **settings).steps(*first_steps)
    second = resumed(half, tmp_path, name, **settings)
    assert_same(half, second)
    assert_same(straight, second.steps(*last_steps))
    # Without the state, the results differ.
    fresh = Problem(name, **settings)
    for key, parameter in fresh.parameters.items():
        parameter.data.copy_(half.parameters[key])
    assert not torch.equal(fresh.steps(*last_steps).parameters[A], straight.parameters[A])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_changes_in_a_group_is_what_is_saved(name):
    """If a library stores another number in its groups, a resumed run must not ignore it."""
    problem = Problem(name)
    before = [dict(group) for group in problem.optimizer.param_groups]
    problem.steps(*range(HALF.get(name, 3)))
    changed = {
        key
        for group, old in zip(problem.optimizer.param_groups, before, strict=True)
        for key, value in group.items()
        if key != "params" and (key not in old or value != old[key])
    }
    assert changed - NOTES == set(RUNNING.get(type(problem.optimizer).__name__, ()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name):
    problem = Problem(name)
    first = problem.loss().item()
    assert problem.steps(*[7] * (120 if name == "prodigy" else 60)).loss().item() < 0.97 * first


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "prodigy"])
def test_a_step_is_about_the_learning_rate_however_small_gradients_and_weights_are(name):
    problem = Problem(name, weight_decay=0.0, gradient_scale=1e-6)
    problem.step(7)
    moved = problem.parameters[B].detach().square().mean().sqrt().item()
    assert 0.1 * problem.rate < moved < 1.1 * problem.rate


def test_prodigy_corrects_its_bias_and_estimates_without_the_rate_of_the_warm_up():
    warming_up, usual = (Problem("prodigy", weight_decay=0.0).steps(number) for number in (0, 7))
    # The first estimate is 1e-6, and B starts at 0.
    for problem, rate in ((warming_up, 1 / 8), (usual, 1)):
        assert problem.parameters[B].abs().max().item() == pytest.approx(rate * 1e-6, rel=1e-3)
    sums = [problem.state()[0][B]["s"] for problem in (warming_up, usual)]
    assert sums[0].any() and torch.equal(*sums)


def test_adamw_with_one_ratio_is_the_one_that_runs_were_trained_by():
    problem, plain = Problem("adamw"), Problem("adamw")
    plain.optimizer = torch.optim.AdamW(plain.parameters.values(), lr=plain.rate, betas=(0.9, 0.999), weight_decay=0.01)
    assert len(problem.optimizer.param_groups) == 1
    for number in range(5):
        problem.step(number)
        plain.step(number)
    assert_same(problem, plain)


def test_b_has_its_ratio_of_the_rate():
    problem, slow, fast = (Problem("adamw", b_ratio=ratio) for ratio in (16.0, 1.0, 1.0))
    fast.rate *= 16
    for each in (problem, slow, fast):
        each.step(3)
    assert torch.equal(problem.parameters[A], slow.parameters[A])
    assert torch.equal(problem.parameters[B], fast.parameters[B])
    assert not torch.equal(problem.parameters[B], slow.parameters[B])


def test_a_vector_does_not_decay_and_muon_takes_none():
    problem = Problem("adamw", vector=True)
    decays = {p: group["weight_decay"] for group in problem.optimizer.param_groups for p in group["params"]}
    assert [decays[p] for p in problem.parameters.values()] == [0.01, 0.01, 0.0]
    with pytest.raises(ConfigError, match=r"takes only matrices, and \S+lora_magnitude is not one: use"):
        Problem("muon", vector=True)


def test_the_averaged_weights_are_shown_and_training_does_not_notice(tmp_path):
    watched, left_alone = Problem("schedule_free"), Problem("schedule_free")
    for number in range(5):
        watched.step(number)
        left_alone.step(number)
        published = inference_weights(watched.optimizer, watched.parameters)
        with temporarily(watched.parameters, published):
            assert all(torch.equal(p, published[name]) for name, p in watched.parameters.items())
        assert_same(watched, left_alone)
    library = copy.deepcopy(left_alone)
    library.optimizer.eval()
    for name, weight in published.items():
        assert torch.equal(weight, library.parameters[name])
        assert not torch.equal(weight, left_alone.parameters[name])
        assert not weight.requires_grad
    second = resumed(watched, tmp_path, "schedule_free")
    again = inference_weights(second.optimizer, second.parameters)
    assert all(torch.equal(again[name], weight) for name, weight in published.items())


def test_before_the_first_step_the_weights_are_shown_as_they_are():
    problem = Problem("schedule_free")
    published = inference_weights(problem.optimizer, problem.parameters)
    assert all(torch.equal(published[name], parameter) for name, parameter in problem.parameters.items())
    assert problem.state() == ({}, [{"k": 0, "weight_sum": 0.0, "lr_max": -1.0}])


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "schedule_free"])
def test_the_others_show_what_they_train(name):
    problem = Problem(name).steps(0)
    assert inference_weights(problem.optimizer, problem.parameters) is None
    with temporarily(problem.parameters, None):
        pass


def test_weights_come_back_when_what_they_are_shown_to_fails():
    problem = Problem("schedule_free").steps(0, 1)
    before = {name: parameter.detach().clone() for name, parameter in problem.parameters.items()}
    published = inference_weights(problem.optimizer, problem.parameters)
    with pytest.raises(KeyboardInterrupt), temporarily(problem.parameters, published):
        raise KeyboardInterrupt
    assert all(torch.equal(parameter, before[name]) for name, parameter in problem.parameters.items())


def spoil(state, groups, damage):
    entry = sorted(state[A])[-1]
    if damage == "no parameter":
        del state[B]
    elif damage == "another parameter":
        state["blocks.1.lora_A"] = state[A]
    elif damage == "no entry":
        del state[A][entry]
    elif damage == "another entry":
        state[A]["momentum"] = state[A][entry]
    elif damage == "another shape":
        key = max(state[A], key=lambda key: state[A][key].ndim)
        state[A][key] = state[A][key][:-1]
    elif damage == "no group":
        groups.pop()
    elif damage == "another number":
        groups[0]["momentum"] = 0.9
    return state, groups


@pytest.mark.parametrize(
    "damage",
    [
        *("no parameter", "another parameter", "no entry", "another entry", "another shape", "no group"),
        "another number",
    ],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_state_is_refused_in_one_line_and_changes_nothing(name, damage):
    problem, untouched = Problem(name).steps(0, 1), Problem(name).steps(0, 1)
    state, groups = spoil(*Problem(name).steps(0, 1, 2).state(), damage)
    with pytest.raises(CheckpointError) as error:
        load_optimizer_state(problem.optimizer, problem.parameters, state, groups)
    assert "is not this run's" in str(error.value) and "\n" not in str(error.value)
    assert_same(problem, untouched)


@pytest.mark.parametrize(("name", "key"), [("prodigy", "d"), ("prodigy", "k"), ("schedule_free", "weight_sum")])
def test_a_group_without_its_number_is_refused(name, key):
    problem = Problem(name).steps(0)
    for spoilt in ({}, {**problem.state()[1][0], key: "1"}):
        with pytest.raises(CheckpointError, match=f"has 1 groups with .*{key}"):
            load_optimizer_state(problem.optimizer, problem.parameters, problem.state()[0], [spoilt])


def test_the_state_of_another_optimizer_is_refused():
    problem = Problem("adamw")
    with pytest.raises(CheckpointError, match="is not this run's AdamW"):
        load_optimizer_state(problem.optimizer, problem.parameters, *Problem("muon").steps(0).state())


def test_adamw_keeps_the_names_of_checkpoints():
    state, groups = Problem("adamw").steps(0).state()
    assert set(state) == {A, B} and set(state[A]) == {"step", "exp_avg", "exp_avg_sq"} and groups == [{}]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_does_not_move_with_the_training(name):
    problem = Problem(name).steps(0)
    state, _ = problem.state()
    kept = copy.deepcopy(state)
    problem.steps(1)
    assert all(torch.equal(t, kept[n][key]) for n, entries in state.items() for key, t in entries.items())
    new = Problem(name)
    load_optimizer_state(new.optimizer, new.parameters, state, problem.state()[1])
    new.steps(2)
    assert all(torch.equal(t, kept[n][key]) for n, entries in state.items() for key, t in entries.items())


def test_parameters_that_would_round_updates_away_are_refused():
    parameters = {A: nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))}
    with pytest.raises(AssertionError, match="fp32"):
        build_adamw(parameters.values(), 1e-4, 0.0, "cpu")
    with pytest.raises(AssertionError, match="fp32"):
        build_optimizer("muon", parameters, 1e-4, 0.0, 1.0, "cpu")


@pytest.mark.parametrize(
    ("name", "library"),
    [("adamw_8bit", "bitsandbytes"), ("prodigy", "prodigyopt"), ("schedule_free", "schedulefree")],
)
def test_a_library_that_is_missing_is_named(name, library, monkeypatch):
    check_installed(name)
    monkeypatch.setitem(sys.modules, library, None)
    for refusal in (lambda: check_installed(name), lambda: Problem(name)):
        with pytest.raises(ConfigError, match=f"train.optimizer={name} needs {library}, .*: pip install .*{library}"):
            refusal()
