"""Builds the optimizers, sets their learning rate, and saves them so that a run resumes bit for bit."""

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mochi_tune.errors import CheckpointError, ConfigError

# Packages of the optimizers that torch does not have.
LIBRARIES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}
BETAS = (0.9, 0.999)
# Entries of the parameter groups that an optimizer changes while it runs, by its class.
RUNNING = {
    "Prodigy": ("d", "d_max", "d_numerator", "k"),
    "AdamWScheduleFree": ("k", "weight_sum", "lr_max"),
}
# The state of one parameter, by entry: "exp_avg", "step" and so on.
ParameterState = dict[str, Tensor]
GroupState = dict[str, float | int | bool | str]


def check_installed(name: str) -> None:
    """Checks that the package of an optimizer is installed, without importing it.

    Raises:
        ConfigError: it is not installed; the error says what to install.
    """
    library = LIBRARIES.get(name)
    if library and importlib.util.find_spec(library) is None:
        package = "'mochi-tune[bitsandbytes]'" if library == "bitsandbytes" else library
        raise ConfigError(f"train.optimizer={name} needs {library}, which is not installed: pip install {package}.")
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"train.optimizer=muon needs torch 2.9 or newer, this is {torch.__version__}: pip install --upgrade torch"
        )


def build_adamw(
    parameters: Iterable[nn.Parameter] | Iterable[dict], learning_rate: float, weight_decay: float, device_type: str
) -> torch.optim.AdamW:
    """Builds AdamW for fp32 parameters or groups of them; the fused implementation on CUDA."""
    fused = device_type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=BETAS, weight_decay=weight_decay, fused=fused)
    _check_precision(p for group in optimizer.param_groups for p in group["params"])
    return optimizer


def _check_precision(parameters: Iterable[nn.Parameter]) -> None:
    # In bf16, the small updates of fine-tuning would be rounded to 0.
    assert all(p.dtype == torch.float32 for p in parameters), "adapter weights and their Adam state are fp32"


def build_optimizer(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    b_ratio: float,
    device_type: str,
) -> torch.optim.Optimizer:
    """Builds an optimizer for the parameters of an adapter; B matrices may have another learning rate.

    Except for "prodigy", a step moves a weight by about the learning rate. Vectors (magnitudes) do not decay: that
    would pull the base model to 0, not the adapter.
    Source: B's own rate is LoRA+, https://arxiv.org/abs/2402.12354 (section 4).

    Args:
        name: a value of `train.optimizer`.
        parameters: fp32 parameters by name: "LAYER.lora_A", "LAYER.lora_B" and others.
        learning_rate: the learning rate of A; see `set_learning_rate`.
        weight_decay: factor of the weight decay; each step also multiplies it by the learning rate.
        b_ratio: the learning rate of B divided by that of A.
        device_type: "cpu" or "cuda".

    Raises:
        ConfigError: the optimizer's package is not installed, or the optimizer does not take one of the parameters.
    """
    check_installed(name)
    _check_precision(parameters.values())
    groups = _groups(parameters, learning_rate, weight_decay, b_ratio)
    if name == "adamw_8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(groups, lr=learning_rate, betas=BETAS)
    if name == "adafactor":
        # The first epsilon is the root of the paper's 1e-30: the gradients of an adapter are far below torch's 1e-7.
        # With the second epsilon, the length of a step is the learning rate. By default it is multiplied by the size of
        # the weight, which is 0 for a new B. Source: https://arxiv.org/abs/1804.04235 (section 8, algorithms 4 and 5).
        return torch.optim.Adafactor(groups, lr=learning_rate, eps=(1e-15, 1.0))
    if name == "prodigy":
        from prodigyopt import Prodigy

        # The authors recommend bias correction for diffusion models, and safeguard_warmup with a warm-up.
        # Source: https://github.com/konstmish/prodigy README.md, "Diffusion models".
        return Prodigy(groups, lr=learning_rate, betas=BETAS, use_bias_correction=True, safeguard_warmup=True)
    if name == "muon":
        if others := [key for key, parameter in parameters.items() if parameter.ndim != 2]:
            raise ConfigError(
                f"train.optimizer=muon takes only matrices, and {others[0]} is not one: use train.optimizer=adamw."
            )
        # Scaled so that AdamW's learning rates fit. Source: https://arxiv.org/abs/2502.16982 (section 2.2).
        return torch.optim.Muon(groups, lr=learning_rate, adjust_lr_fn="match_rms_adamw")
    if name == "schedule_free":
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(groups, lr=learning_rate, betas=BETAS)
        optimizer.train()
        return optimizer
    assert name == "adamw", name
    return build_adamw(groups, learning_rate, weight_decay, device_type)


def _groups(
    parameters: Mapping[str, nn.Parameter], learning_rate: float, weight_decay: float, b_ratio: float
) -> list[dict[str, Any]]:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        ratio = b_ratio if name.endswith(".lora_B") else 1.0
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((ratio, decay), []).append(parameter)
    return [
        {"params": members, "lr": learning_rate * ratio, "lr_ratio": ratio, "weight_decay": decay}
        for (ratio, decay), members in groups.items()
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of the next step; a group with an lr_ratio multiplies it by that."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, ParameterState], list[GroupState]]:
    """Returns the state of an optimizer: the tensors of each parameter, on the CPU, and the numbers of each group.

    safetensors stores the tensors exactly, and JSON the numbers. Before the first step there are no tensors.
    """
    state = {
        name: {key: torch.as_tensor(value).detach().cpu().clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in parameters.items()
        if optimizer.state.get(parameter)
    }
    running = RUNNING.get(type(optimizer).__name__, ())
    return state, [{key: group[key] for key in running} for group in optimizer.param_groups]


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, ParameterState],
    groups: list[GroupState],
) -> None:
    """Restores the result of `optimizer_state` in an optimizer that was built with the same settings.

    Raises:
        CheckpointError: parameters, entries, shapes or numbers of groups differ from those of this optimizer, which
            stays as it is.
    """
    _check_parameters(optimizer, parameters, state)
    _check_groups(optimizer, groups)
    names = {id(parameter): name for name, parameter in parameters.items()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    # The optimizer moves moments and step counters to the device that its kernel needs.
    numbered = {number: {k: _own(v) for k, v in state[name].items()} for number, name in enumerate(ordered)}
    own = optimizer.state_dict()["param_groups"]
    if RUNNING.get(type(optimizer).__name__):
        own = [{**group, **saved} for group, saved in zip(own, groups, strict=True)]
    optimizer.load_state_dict({"state": numbered, "param_groups": own})


def _own(value: Tensor) -> Tensor | int:
    """Returns a copy, or an int for an integer scalar, because some optimizers count steps in Python integers."""
    return int(value) if value.ndim == 0 and value.dtype == torch.int64 else value.clone()


def _check_parameters(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, ParameterState]
) -> None:
    check_names(parameters, state)
    kind = type(optimizer).__name__
    for name, parameter in parameters.items():
        expected, found = _state_shapes(kind, parameter), {key: tuple(v.shape) for key, v in state[name].items()}
        if kind == "Prodigy" and found.get("p0") == ():
            # If all initial weights are 0, Prodigy stores them as a scalar.
            expected["p0"] = ()
        if expected != found:
            key = min(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
            texts = [one.get(key, "absent") for one in (found, expected)]
            raise CheckpointError(
                f"the checkpoint's optimizer is not this run's {kind}: {name}/{key} is {texts[0]}, not {texts[1]}: "
                "resume with the settings of the checkpoint."
            )


def check_names(parameters: Mapping[str, object], saved: Mapping[str, object]) -> None:
    """Refuses a saved state that has other parameters than the adapter.

    Raises:
        CheckpointError: names differ.
    """
    if differing := sorted(saved.keys() ^ parameters.keys()):
        raise CheckpointError(
            f"the checkpoint is not this run's: {len(differing)} parameters differ, such as {differing[0]}."
        )


def _check_groups(optimizer: torch.optim.Optimizer, groups: list[GroupState]) -> None:
    kind, own = type(optimizer).__name__, optimizer.param_groups
    wanted = RUNNING.get(kind, ())
    # Without such numbers the groups may differ, for example after a change of train.learning_rate_b_ratio.
    if not wanted and groups and not any(groups):
        return
    expected = [{key: type(group[key]) for key in wanted} for group in own]
    if expected != [{key: type(value) for key, value in group.items()} for group in groups]:
        raise CheckpointError(
            f"the checkpoint's optimizer is not this run's {kind}, which has {len(own)} groups with "
            f"{', '.join(wanted) or 'no numbers'}: resume with the settings of the checkpoint."
        )


def _state_shapes(kind: str, parameter: nn.Parameter) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each entry of the state of a parameter; `kind` is the class of the optimizer."""
    same, count = tuple(parameter.shape), parameter.numel()
    if kind == "AdamW8bit":
        shapes = {"step": (), "state1": same, "state2": same}
        if count < 4096:  # bitsandbytes keeps the state of small parameters in fp32.
            return shapes
        blocks = -(-count // 256)
        return shapes | {"qmap1": (256,), "qmap2": (256,), "absmax1": (blocks,), "absmax2": (blocks,)}
    if kind == "Adafactor":
        if len(same) == 1:
            return {"step": (), "variance": same}
        return {"step": (), "row_var": (*same[:-1], 1), "col_var": (*same[:-2], 1, same[-1])}
    return {
        "AdamW": {"step": (), "exp_avg": same, "exp_avg_sq": same},
        "Prodigy": {"step": (), "s": (count,), "p0": (count,), "exp_avg": same, "exp_avg_sq": same},
        "Muon": {"momentum_buffer": same},
        "AdamWScheduleFree": {"z": same, "exp_avg_sq": same},
    }[kind]


@torch.no_grad()
def inference_weights(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor] | None:
    """Returns the weights for inference if they differ from the trained weights, else None.

    "schedule_free" steps z, averages the steps in x, which is the result, and trains at y, a point between the two.
    This computes x into new tensors, because the optimizer's own switch to x and back would round y.
    Source: https://arxiv.org/abs/2405.15682 (section 2); x of y and z as in schedulefree 1.4.1, `eval`.
    """
    if type(optimizer).__name__ != "AdamWScheduleFree":
        return None
    weight = 1 - 1 / BETAS[0]
    return {
        name: parameter.lerp(optimizer.state[parameter]["z"], weight)
        if optimizer.state.get(parameter)
        else parameter.detach().clone()
        for name, parameter in parameters.items()
    }


@contextlib.contextmanager
def temporarily(
    parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor] | None
) -> Iterator[dict[str, Tensor]]:
    """Replaces the weights of the parameters within the context, and restores them afterwards bit for bit.

    Yields copies of the original weights.

    Args:
        parameters: the trained parameters, by name.
        weights: tensors of the same names and shapes, see `inference_weights`; None changes nothing.
    """
    kept = {name: parameters[name].detach().clone() for name in weights or ()}
    try:
        for name, value in (weights or {}).items():
            parameters[name].data.copy_(value)
        yield kept
    finally:
        for name, value in kept.items():
            parameters[name].data.copy_(value)
