"""Compiling the DiT's blocks: the arithmetic between matrix products is fused, and reads and writes memory once."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mochi_tune.models.attention import JointAttention
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.parallel.recompute import BlockFunction, block_function

# Of one function: two kinds of block, a prompt or none, for each bucket of sizes; torch's own limit is 8.
MAX_GRAPHS = 256


def apply_compilation(
    dit: AsymmDiT,
    log: Callable[[str], None],
    only_training: bool = False,
    before_each: Callable[[], None] | None = None,
    backend: str = "inductor",
) -> None:
    """Compiles the blocks, once for all equal ones: one graph for each size of video, for prompts of any length.

    The first step of a size takes longer. Blocks that do not compile run as they are, and a line says why.
    Rows whose prompts have different lengths run uncompiled, as they are attended one by one.

    Args:
        dit: what else is done to its blocks, such as checkpointing, was done before.
        log: writes a line for the user.
        only_training: whether passes without gradients run uncompiled, as they would need graphs of their own.
        before_each: called before each graph is compiled; what it raises ends the pass.
        backend: of torch.compile.
    """
    # Not at the top: it takes a second, which a typo in a setting should not wait for.
    import torch._dynamo
    import torch._inductor.config

    if hasattr(torch._inductor.config, "deterministic"):
        # Kernels are then not chosen by their times, which differ from run to run, and round in another order.
        torch._inductor.config.deterministic = torch.are_deterministic_algorithms_enabled()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    compiler = _Compiler(log, only_training, before_each or (lambda: None), backend)
    for block in dit.blocks:
        core = block.get_submodule("attn.core")
        if not isinstance(core, JointAttention):
            # Processes exchange tokens in it.
            core.forward = torch.compiler.disable(core.forward)
        block.forward = functools.partial(compiler.compiled(block_function(block)), block)


class _Compiler:
    """Compiles functions of blocks; after a failure all of them run uncompiled."""

    def __init__(
        self, log: Callable[[str], None], only_training: bool, before_each: Callable[[], None], backend: str
    ) -> None:
        self.log, self.only_training, self.before_each, self.backend = log, only_training, before_each, backend
        from torch._dynamo.exc import TorchDynamoException

        self.error = TorchDynamoException
        # Kind of block, sizes and whether there is a prompt, of what is compiled.
        self.known: set[tuple[Any, ...]] = set()
        self.has_failed = False
        self.functions: dict[BlockFunction, BlockFunction] = {}

    def compiled(self, function: BlockFunction) -> BlockFunction:
        if function not in self.functions:
            fast = torch.compile(function, backend=self.backend)
            # No partial: one of a partial would be taken apart.
            self.functions[function] = lambda block, *inputs: self._call(fast, function, block, *inputs)
        return self.functions[function]

    def _call(
        self,
        fast: BlockFunction,
        plain: BlockFunction,
        block: nn.Module,
        x: Tensor,
        y: Tensor,
        modulation: tuple[Tensor, Tensor],
        rope: tuple[Tensor, Tensor],
        text_lengths: Sequence[int] | None,
    ) -> Any:
        is_wanted = torch.is_grad_enabled() or not self.only_training
        if is_wanted and not self.has_failed and text_lengths is None:
            if torch.is_grad_enabled() and not x.requires_grad:
                # The first block: its streams get gradients that nothing needs, or it would need a graph of its own.
                x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            torch._dynamo.mark_static(x, 1)
            # Of any length, but for the empty prompt: torch makes a graph of its own for a size of 0.
            torch._dynamo.maybe_mark_dynamic(y, 1)
            case = fast, block.update_y, x.shape, y.shape[1] > 0, torch.is_grad_enabled()
            if case not in self.known:
                self.before_each()
                self.known.add(case)
            try:
                return fast(block, x, y, modulation, rope, None)
            except self.error as error:
                self.has_failed = True
                reason = " ".join(str(error).split())[:200]
                self.log(f"the blocks run uncompiled, as torch could not compile them: {reason}")
        return plain(block, x, y, modulation, rope, text_lengths)
