"""ZeRO stage 0: every rank holds the whole optimizer. Our own norm and clipping, since DeepSpeed's stage 0 reports none."""

from collections.abc import Iterator
from typing import Any

import torch

from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.optimizer import (
    MOMENTS,
    Adam,
    Held,
    StepResult,
    adamw,
    create_moments,
    get_updates,
    held_frozen,
    held_part,
    parameter_groups,
    set_updates,
)


class ReplicatedOptimizer:
    """AdamW on fp32 masters; gradients summed in fp32, averaged over the ranks of ``grid.data`` once a step."""

    def __init__(self, module: torch.nn.Module, adam: Adam, grid: Grid) -> None:
        self.module, self.clip_grad, self.grid = module, adam.clip_grad, grid
        groups = parameter_groups(module, adam.weight_decay)
        params = [param for group in groups for param in group["params"]]
        # In fp32 a parameter is its own master.
        masters = [p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float()) for p in params]
        self.masters: dict[Any, Any] = dict(zip(params, masters))
        for group in groups:
            group["params"] = [self.masters[param] for param in group["params"]]
        self.adam = adamw(groups, adam)
        create_moments(self.adam, masters)
        for param, master in self.masters.items():
            if param is not master:
                param.register_post_accumulate_grad_hook(self._accumulate)

    def forward(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def collect(self) -> None:
        for param in self.masters:
            if param.grad is not None and param is not self.masters[param]:
                self._accumulate(param)

    def step(self, learning_rate: float, update: bool = True) -> StepResult:
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        counted = []
        for param, master in self.masters.items():
            if master.grad is not None:
                self.grid.data.all_reduce(master.grad).div_(self.grid.data.size)
                if self.grid.tp.rank == 0 or param.tensor_model_parallel:  # what all tp ranks hold counts once
                    counted.append(master.grad)
        norm = self.grid.tp.all_reduce(torch.nn.utils.get_total_norm(counted).square()).sqrt()
        applied = update and bool(torch.isfinite(norm))
        if applied:
            if self.clip_grad > 0:
                torch.nn.utils.clip_grads_with_norm_(self.masters.values(), self.clip_grad, norm)
            self.adam.step()
            self._copy_to_weights()
        self.adam.zero_grad(set_to_none=True)
        return StepResult(float(norm), applied)

    def held(self) -> Iterator[Held]:
        for param, master in self.masters.items():
            tensors = {"weight": master, **{kind: self.adam.state[master][kind] for kind in MOMENTS}}
            yield held_part(param, 0, param.numel(), tensors, self.grid, replicated=True)
        yield from held_frozen(self.module, self.grid)

    def updates(self) -> int:
        return get_updates(self.adam)

    def restored(self, updates: int) -> None:
        set_updates(self.adam, updates)
        self._copy_to_weights()

    @torch.no_grad()
    def _copy_to_weights(self) -> None:
        for param, master in self.masters.items():
            if param is not master:
                param.copy_(master)

    def _accumulate(self, param: torch.Tensor) -> None:
        master = self.masters[param]
        assert param.grad is not None
        if master.grad is None:
            master.grad = param.grad.float()
        else:
            master.grad += param.grad
        param.grad = None
