"""How the ranks of a training make one update together: gradients averaged, or DeepSpeed's ZeRO under Accelerate.

Both hold and give the same state under the same names, so that a run may go on under the other one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mochi_tune.errors import CheckpointError

STRATEGIES = ("data", "zero2", "zero3")
# State of one parameter, by entry: "exp_avg", "step" and so on.
OptimizerState = Mapping[str, Mapping[str, Tensor]]


class DataParallel:
    """Every rank has the whole model; gradients are averaged over the ranks once a step.

    They are averaged in one piece, so that the sums have the same order in every run, resumed or not; DDP's buckets,
    which are laid out anew after the first step, would not give the same bits.
    """

    def __init__(
        self,
        dit: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        accumulation_steps: int,
        max_grad_norm: float,
    ) -> None:
        self.dit = dit
        self.parameters = dict(parameters)
        self.optimizer = optimizer
        self.accumulation_steps = accumulation_steps
        self.max_grad_norm = max_grad_norm

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Adds a micro-batch's gradients; `is_last` of the step."""
        (loss / self.accumulation_steps).backward()

    def gradient_norm(self) -> Tensor:
        """Averages the gradients over all ranks, clips them, and returns their norm before that; a tensor ()."""
        parameters = list(self.parameters.values())
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad.copy_(gradient.view_as(parameter))
        return nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)

    def update(self) -> None:
        """Makes the step."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def adapter(self) -> dict[str, Tensor]:
        """Returns the whole adapter, fp32 on the CPU; all ranks call it."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Returns the whole state of every parameter on the CPU, nothing before the first step; all ranks call it."""
        return {
            name: {key: value.detach().cpu().clone() for key, value in self.optimizer.state[parameter].items()}
            for name, parameter in self.parameters.items()
            if parameter in self.optimizer.state
        }

    def load(self, adapter: Mapping[str, Tensor], state: OptimizerState, example_loss: Callable[[], Tensor]) -> None:
        """Puts a saved adapter and its optimizer's state back; the loss is what `Zero` needs."""
        check_names(self.parameters, adapter, state)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(adapter[name])
        # torch itself puts moments and step counters where this device's kernel wants them.
        numbered = {number: dict(state[name]) for number, name in enumerate(self.parameters)}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})


class Zero:
    """DeepSpeed shards the optimizer and gradients (stage 2), and the model's weights too (stage 3)."""

    def __init__(
        self,
        dit: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        accumulation_steps: int,
        max_grad_norm: float,
        stage: int,
    ) -> None:
        self.parameters = dict(parameters)
        self.base_optimizer = optimizer
        self.engine = _deepspeed_engine(dit, optimizer, accumulation_steps, max_grad_norm, stage)
        self.dit = self.engine

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Adds a micro-batch's gradients; `is_last` of the step."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss)
        if not is_last:
            self.engine.step()

    def gradient_norm(self) -> Tensor:
        """Returns the norm of the averaged gradients, as they are before DeepSpeed clips them in `update`."""
        from deepspeed.utils import safe_get_full_grad

        norms = [safe_get_full_grad(parameter).float().norm() for parameter in self.parameters.values()]
        return torch.stack(norms).norm()

    def update(self) -> None:
        """Makes the step."""
        self.engine.step()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the rate of the next step."""
        for group in self.base_optimizer.param_groups:
            group["lr"] = learning_rate

    def adapter(self) -> dict[str, Tensor]:
        """Returns the whole adapter, fp32 on the CPU; all ranks call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        full = {name: safe_get_full_fp32_param(parameter) for name, parameter in self.parameters.items()}
        assert all(tensor is not None and tensor.numel() for tensor in full.values()), "a shard is not an adapter"
        return {name: tensor.detach().cpu().clone() for name, tensor in full.items()}

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Returns the whole state of every parameter on the CPU, nothing before the first step; all ranks call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = _flat_state(self.base_optimizer)
        if not flat:
            return {}
        whole = {key: value for key, value in flat.items() if value.ndim == 0}
        return {
            name: {key: value.detach().cpu().clone() for key, value in whole.items()}
            | {
                key: safe_get_full_optimizer_state(parameter, key).detach().cpu().clone()
                for key in flat.keys() - whole.keys()
            }
            for name, parameter in self.parameters.items()
        }

    def load(self, adapter: Mapping[str, Tensor], state: OptimizerState, example_loss: Callable[[], Tensor]) -> None:
        """Puts a saved adapter and its optimizer's state back.

        DeepSpeed makes the state in a first step: that is done at a learning rate of 0, and what it made replaced.
        """
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        check_names(self.parameters, adapter, state)
        self.set_learning_rate(0.0)
        self.backward(example_loss(), is_last=True)
        self.update()
        for name, parameter in self.parameters.items():
            # The copy that is trained, and the one that computes.
            safe_set_full_fp32_param(parameter, adapter[name])
            with GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(adapter[name])
            for key, value in state[name].items():
                if value.ndim:
                    safe_set_full_optimizer_state(parameter, value, key)
        whole = {key: value for key, value in next(iter(state.values())).items() if value.ndim == 0}
        for flat in self.base_optimizer.state.values():
            for key, value in whole.items():
                flat[key].copy_(value)


def build_engine(
    strategy: str,
    dit: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    accumulation_steps: int,
    max_grad_norm: float,
) -> "DataParallel | Zero":
    """Builds the engine of a strategy, one of STRATEGIES, over a model with its adapter; all ranks call it.

    Args:
        strategy: how the ranks share the model and the update.
        dit: with a trainable adapter, on the device.
        parameters: the adapter's, by name.
        optimizer: over them, without any state.
        accumulation_steps: micro-batches a step.
        max_grad_norm: gradients above this norm are scaled down to it.
    """
    assert strategy in STRATEGIES, strategy
    if strategy == "data":
        return DataParallel(dit, parameters, optimizer, accumulation_steps, max_grad_norm)
    stage = int(strategy.removeprefix("zero"))
    return Zero(dit, parameters, optimizer, accumulation_steps, max_grad_norm, stage)


def check_names(parameters: Mapping[str, object], *saved: Mapping[str, object]) -> None:
    """Refuses a saved state that is not of these parameters.

    Raises:
        CheckpointError: names differ.
    """
    for names in saved:
        if differing := sorted(names.keys() ^ parameters.keys()):
            raise CheckpointError(
                f"the checkpoint is not this run's: {len(differing)} layers differ, {differing[0]} among them."
            )


def _deepspeed_engine(
    dit: nn.Module,
    optimizer: torch.optim.Optimizer,
    accumulation_steps: int,
    max_grad_norm: float,
    stage: int,
) -> Any:
    from accelerate import Accelerator, DeepSpeedPlugin

    config = {
        "train_micro_batch_size_per_gpu": 1,  # It only counts samples by this; batches are ours.
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_grad_norm,
        # Its own Linear would add the bias after rounding the product to bf16.
        "zero_optimization": {"stage": stage, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        # The dtypes are as they were loaded: fp32 adapters over a base of any.
        "bf16": {"enabled": False},
        "communication_data_type": "fp32",
        "wall_clock_breakdown": False,
        "steps_per_print": 10**12,
    }
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    engine, _ = accelerator.prepare(dit, optimizer)
    return engine


def _flat_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return next((dict(state) for state in optimizer.state.values() if state), {})
