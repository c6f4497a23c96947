"""DeepSpeed's ZeRO engine (stages 1, 2, 3) as the sharded optimizer.

The settings that make bf16 equal to fp32 accumulation, reduction and masters were found by measurement (docs/design.md).
"""

import contextlib
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


def deepspeed_settings(
    stage: int,
    bf16: bool,
    micro_batch_size: int,
    clip_grad: float,
    reduce_bucket_size: int,
    offload: bool,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """DeepSpeed's configuration; ``extra`` is the user's ``deepspeed`` section."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip_grad,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": reduce_bucket_size},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if bf16:
        settings["bf16"] = {"enabled": True, **({"immediate_grad_update": True} if stage == 1 else {})}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    if offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        settings["zero_optimization"]["memory_efficient_linear"] = False
    return _merged(settings, extra)


class ZeroOptimizer:
    """One engine around one module. Names are those of ``module.named_parameters()``."""

    def __init__(self, module: torch.nn.Module, adam: Adam, settings: dict[str, Any], grid: Grid) -> None:
        import deepspeed

        self.module, self.stage, self.grid = module, settings["zero_optimization"]["stage"], grid
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=adamw(parameter_groups(module, adam.weight_decay), adam),
            config=settings,
            mpu=_Mpu(grid),
        )
        trained = (p for p in module.parameters() if p.requires_grad)
        self.tied: list[Any] = [p for p in trained if getattr(p, "tied_over_stages", False)]
        self.wrapper = self.engine.optimizer
        self.adam = self.wrapper.optimizer
        create_moments(self.adam, self._masters())
        if self.stage < 3:
            self.wrapper._lazy_init_hp_params_optimizer_state()

    def forward(self, *args: Any) -> Any:
        # Stage 1 needs no hook of the engine in forward and backward; without them one reduction a step is enough.
        return self.module(*args) if self.stage == 1 else self.engine(*args)

    def backward(self, loss: torch.Tensor) -> None:
        if self.stage == 1:
            loss.backward()
        else:
            self.engine.backward(loss)

    def collect(self) -> None:
        groups = getattr(self.wrapper, "bf16_groups", None)
        if groups is None or self.stage > 1:
            self.wrapper.setup_buckets()  # which its hooks do
            return
        for i, group in enumerate(groups):
            for j, param in enumerate(group):
                if param.grad is not None:
                    self.wrapper.accumulate_hp_grads_and_remove_lp(param, i, j)

    def step(self, learning_rate: float, update: bool = True) -> StepResult:
        for group in self.wrapper.param_groups:
            group["lr"] = learning_rate
        for param in self.tied:  # fp32 sums lie where DeepSpeed keeps them, in bf16 not in .grad
            self.grid.ends.all_reduce(param.grad if param.grad is not None else param._hp_grad)
        with contextlib.nullcontext() if update else self._without_update():
            self.engine.step()
        return StepResult(float(self.engine.get_global_grad_norm()), update and not self.wrapper.overflow)

    def held(self) -> Iterator[Held]:
        for param in self.module.parameters():
            if self.stage == 3:
                yield from self._held_shard(param)
            elif (part := getattr(param, "_hp_mapping", None)) is not None:
                address = part.lp_fragment_address
                tensors = {"weight": part.hp_fragment, **{kind: part.optim_fragment[kind] for kind in MOMENTS}}
                yield held_part(param, address.start, address.numel, tensors, self.grid, replicated=False)
        if self.stage < 3:
            yield from held_frozen(self.module, self.grid)

    def updates(self) -> int:
        return get_updates(self.adam)

    def restored(self, updates: int) -> None:
        set_updates(self.adam, updates)
        if self.stage < 3:
            self.wrapper.update_lp_params()
            return
        for i in range(len(self.wrapper.fp16_groups)):
            self.wrapper._reassign_or_swap_out_partitioned_parameters(i)
        persistent = self.wrapper.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    @contextlib.contextmanager
    def _without_update(self) -> Iterator[None]:
        """DeepSpeed does all that belongs to a step, clears the gradients too, around an AdamW that does nothing."""
        self.adam.step = lambda *_, **__: None
        try:
            yield
        finally:
            del self.adam.step

    def destroy(self) -> None:
        """Take the engine's hooks off the module, and DeepSpeed's memory of the grid."""
        from deepspeed.utils import groups

        self.engine.destroy()
        groups.mpu = None

    def _masters(self) -> list[torch.Tensor]:
        """The flat fp32 tensors that AdamW updates."""
        names = ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
        return next(getattr(self.wrapper, name) for name in names if hasattr(self.wrapper, name))

    def _held_shard(self, param: Any) -> Iterator[Held]:
        """Stage 3 cuts each parameter into equal flat shards by rank, the last one padded."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        weight = safe_get_local_fp32_param(param) if param.requires_grad else param.ds_tensor
        start = self.grid.data.rank * weight.numel()
        numel = min(weight.numel(), param.ds_numel - start)
        if numel > 0:
            kinds = MOMENTS if param.requires_grad else ()
            tensors = {"weight": weight, **{kind: safe_get_local_optimizer_state(param, kind) for kind in kinds}}
            yield held_part(param, start, numel, tensors, self.grid, replicated=False)


class _Mpu:
    """The grid as DeepSpeed asks for it: its data parallelism is our dp x cp, its model parallelism tp x pp."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def get_data_parallel_group(self) -> Any:
        return self.grid.data.handle

    def get_data_parallel_rank(self) -> int:
        return self.grid.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self.grid.data.size

    def get_model_parallel_group(self) -> Any:
        return self.grid.model.handle

    def get_model_parallel_rank(self) -> int:
        return self.grid.model.rank

    def get_model_parallel_world_size(self) -> int:
        return self.grid.model.size

    def get_tensor_model_parallel_group(self) -> Any:
        return self.grid.tp.handle

    def get_tensor_model_parallel_rank(self) -> int:
        return self.grid.tp.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.grid.tp.size


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for name, value in extra.items():
        out[name] = _merged(out[name], value) if isinstance(value, dict) and isinstance(out.get(name), dict) else value
    return out
