"""How the ranks of a training make one update together: gradients averaged, or DeepSpeed's ZeRO under Accelerate.

Both hold and give the same state under the same names, so that a run may go on under the other one.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mochi_tune.errors import CheckpointError
from mochi_tune.training.optim import (
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
    showing,
    shown_weights,
)

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

    def discard(self) -> None:
        """Leaves the step out, as if its gradients had never been."""
        self.optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the rate of the next step."""
        set_learning_rate(self.optimizer, learning_rate)

    def weights(self) -> Mapping[str, Tensor]:
        """Returns the whole adapter as it lies on the device; all ranks call it."""
        return self.parameters

    def shown_weights(self) -> dict[str, Tensor] | None:
        """Returns the weights that are to be used where they are not those that are trained."""
        return shown_weights(self.optimizer, self.parameters)

    def showing(self, weights: Mapping[str, Tensor] | None) -> contextlib.AbstractContextManager[None]:
        """Puts other weights in the adapter's place while the context lasts; None leaves it alone."""
        return showing(self.parameters, weights)

    def optimizer_state(self) -> tuple[dict[str, dict[str, Tensor]], list[dict]]:
        """Returns the whole state of every parameter on the CPU, and the groups' numbers; all ranks call it."""
        return optimizer_state(self.optimizer, self.parameters)

    def load(
        self,
        adapter: Mapping[str, Tensor],
        state: OptimizerState,
        groups: list[dict],
        example_loss: Callable[[], Tensor],
    ) -> None:
        """Puts a saved adapter and its optimizer's state back; the loss is what `Zero` needs.

        Raises:
            CheckpointError: they are not of this adapter or this optimizer.
        """
        check_adapter_fits(self.parameters, adapter)
        load_optimizer_state(self.optimizer, self.parameters, state, groups)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(adapter[name])


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

    def discard(self) -> None:
        """Leaves the step out: DeepSpeed knows no other way to be rid of gradients than to make it, so it is undone."""
        adapter, (state, _) = self._copied(), self.optimizer_state()
        self.update()
        self._put(adapter, state)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the rate of the next step."""
        set_learning_rate(self.base_optimizer, learning_rate)

    def weights(self) -> Mapping[str, Tensor]:
        """Returns the whole adapter as it lies on the device; all ranks call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        full = {name: safe_get_full_fp32_param(parameter) for name, parameter in self.parameters.items()}
        assert all(tensor is not None and tensor.numel() for tensor in full.values()), "a shard is not an adapter"
        return full

    def shown_weights(self) -> None:
        """Returns None: those that are trained are those that are used."""

    @contextlib.contextmanager
    def showing(self, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Puts other weights in the adapter's place while the context lasts; None leaves it alone."""
        if weights is None:
            yield
            return
        kept = self._copied()
        self._compute_with(weights)
        try:
            yield
        finally:
            self._compute_with(kept)

    def optimizer_state(self) -> tuple[dict[str, dict[str, Tensor]], list[dict]]:
        """Returns the whole state of every parameter on the CPU, and the groups' numbers; all ranks call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        groups: list[dict] = [{} for _ in self.base_optimizer.param_groups]
        flat = next((dict(state) for state in self.base_optimizer.state.values() if state), {})
        if not flat:
            return {}, groups
        whole = {key: value for key, value in flat.items() if value.ndim == 0}
        # In the same order on every rank: they sum what they are asked for.
        shared = [key for key in flat if key not in whole]
        return {
            name: {key: value.detach().cpu().clone() for key, value in whole.items()}
            | {key: safe_get_full_optimizer_state(parameter, key).detach().cpu().clone() for key in shared}
            for name, parameter in self.parameters.items()
        }, groups

    def load(
        self,
        adapter: Mapping[str, Tensor],
        state: OptimizerState,
        groups: list[dict],
        example_loss: Callable[[], Tensor],
    ) -> None:
        """Puts a saved adapter and its optimizer's state back.

        DeepSpeed makes the state in a first step: that is done at a learning rate of 0, and what it made replaced.

        Raises:
            CheckpointError: they are not of this adapter or this optimizer.
        """
        check_adapter_fits(self._copied(), adapter)
        check_names(self.parameters, state)
        self.set_learning_rate(0.0)
        self.backward(example_loss(), is_last=True)
        self.update()
        self._put(adapter, state)

    def _copied(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.weights().items()}

    def _put(self, adapter: Mapping[str, Tensor], state: OptimizerState) -> None:
        """Replaces the copy that is trained, the one that computes, and the optimizer's state."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self.parameters.items():
            safe_set_full_fp32_param(parameter, adapter[name])
            for key, value in state[name].items():
                if value.ndim:
                    safe_set_full_optimizer_state(parameter, value, key)
        self._compute_with(adapter)
        whole = {key: value for key, value in next(iter(state.values())).items() if value.ndim == 0}
        for flat in self.base_optimizer.state.values():
            for key, value in whole.items():
                flat[key].copy_(value)

    def _compute_with(self, weights: Mapping[str, Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        for name, parameter in self.parameters.items():
            with GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(weights[name])


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


def check_adapter_fits(parameters: Mapping[str, Tensor], adapter: Mapping[str, Tensor]) -> None:
    """Refuses a saved adapter that is not of these parameters.

    Raises:
        CheckpointError: names or sizes differ.
    """
    check_names(parameters, adapter)
    for name, parameter in parameters.items():
        if parameter.shape != adapter[name].shape:
            sizes = tuple(adapter[name].shape), tuple(parameter.shape)
            raise CheckpointError(f"the checkpoint is not this run's: {name} is {sizes[0]} there, {sizes[1]} here.")


def check_names(parameters: Mapping[str, object], saved: Mapping[str, object]) -> None:
    """Refuses a saved state that is not of these parameters.

    Raises:
        CheckpointError: names differ.
    """
    if differing := sorted(saved.keys() ^ parameters.keys()):
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
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin

    # It would be compiled for a minute, where there is a compiler, for something that a training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
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
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    accelerator = Accelerator(gradient_accumulation_steps=accumulation_steps, deepspeed_plugin=plugin)
    engine, _ = accelerator.prepare(dit, optimizer)
    return engine
