"""What AdamW does to which parameter, alike at every ZeRO stage; and the private names of DeepSpeed that this rests on."""

import math
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_zebra.data.batch import read_step
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.optimizer import parameter_groups
from megatron_zebra.training.build import build_model, build_optimizer
from tests.training.cases import opened, small

EVERYTHING = {"model__qkv_bias": True, "model__qk_norm": True, "model__num_layers": 2}


def test_matrices_have_weight_decay_norms_and_biases_none() -> None:
    config = small(**EVERYTHING)
    arch, _ = opened(config)
    model = build_model(config, arch, torch.device("cpu"))
    names = {id(param): name for name, param in model.named_parameters()}
    decayed, plain = ({names[id(param)] for param in group["params"]} for group in parameter_groups(model, 0.3))
    assert [group["weight_decay"] for group in parameter_groups(model, 0.3)] == [0.3, 0.0]
    assert decayed | plain == set(arch.parameter_shapes())
    assert plain == {name for name in names.values() if "norm" in name or name.endswith("bias")}
    assert {"embedding.weight", "head.weight", "layers.1.mlp.down_proj.weight"} <= decayed


def shrunk(grid: Grid, stage: int) -> dict[str, bool]:
    """By parameter, over one step with a gradient of zero: did it shrink by learning rate x decay (else it stayed)?"""
    config = small(**EVERYTHING, optimizer__zero_stage=stage, optimizer__weight_decay=0.5)
    arch, inputs = opened(config)
    optimizer = build_optimizer(config, build_model(config, arch, grid.device), grid)
    before = {part.name: part.tensors["weight"].clone() for part in optimizer.held()}
    batch = read_step(inputs.train, 0, 0, 2, 1, grid.dp_rank, grid.dp_size).micro_batches[0]
    optimizer.backward(optimizer.forward(*batch.here(grid.device).inputs).sum * 0.0)
    optimizer.step(0.1)
    after = {part.name: part.tensors["weight"] for part in optimizer.held()}
    out = {}
    for name, old in before.items():
        if torch.equal(after[name], old) and old.any():
            out[name] = False
        elif old.any():
            torch.testing.assert_close(after[name], old * (1 - 0.1 * 0.5))
            out[name] = True
    return out


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weight_decay_reaches_matrices_only(run_distributed: Any, stage: int) -> None:
    found = {name: value for part in run_distributed(shrunk, 2, stage) for name, value in part.items()}
    assert len(found) > 20
    for name, value in found.items():
        assert value == ("norm" not in name), name


def loss_after_restoring_zeros(grid: Grid, stage: int, precision: str) -> float:
    """Mean loss with all weights written over by zeros in the middle of training, when some may lie gathered."""
    config = small(**EVERYTHING, optimizer__zero_stage=stage, training__precision=precision)
    arch, inputs = opened(config)
    optimizer = build_optimizer(config, build_model(config, arch, grid.device), grid)
    batch = read_step(inputs.train, 0, 0, 2, 1, grid.dp_rank, grid.dp_size).micro_batches[0].here(grid.device)
    optimizer.backward(optimizer.forward(*batch.inputs).sum)
    optimizer.step(0.01)
    for part in optimizer.held():
        part.tensors["weight"].zero_()
    optimizer.restored(1)
    with torch.no_grad():
        return float(optimizer.forward(*batch.inputs).tokens.sum()) / batch.targets


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_restored_weights_are_those_computed_with(run_distributed: Any, stage: int, precision: str) -> None:
    for loss in run_distributed(loss_after_restoring_zeros, 2, stage, precision):
        assert loss == pytest.approx(math.log(101), abs=1e-3)


def test_the_pinned_deepspeed_has_the_names_we_use() -> None:
    pinned = re.search(r'"deepspeed==([\d.]+)"', Path("pyproject.toml").read_text())
    assert pinned is not None
    assert metadata.version("deepspeed") == pinned[1]

    import deepspeed.ops
    import deepspeed.runtime.bf16_optimizer as bf16
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    assert callable(bf16.see_memory_usage)
    for kind in (DeepSpeedZeroOptimizer, bf16.BF16_Optimizer):
        assert callable(kind._lazy_init_hp_params_optimizer_state)
        assert callable(kind.update_lp_params)
    assert callable(DeepSpeedZeroOptimizer_Stage3._reassign_or_swap_out_partitioned_parameters)
    assert callable(DeepSpeedEngine.get_global_grad_norm)
    assert callable(safe_get_local_fp32_param)
    assert callable(safe_get_local_optimizer_state)


def private_names(grid: Grid, stage: int, precision: str) -> list[str]:
    """Attributes of the built optimizer that are missing."""
    config = small(optimizer__zero_stage=stage, training__precision=precision, model__num_layers=2)
    arch, _ = opened(config)
    optimizer: Any = build_optimizer(config, build_model(config, arch, grid.device), grid)
    wrapper, param = optimizer.wrapper, next(optimizer.engine.module.parameters())
    wanted = [(wrapper, "overflow"), (wrapper, "optimizer"), (wrapper, "param_groups")]
    if stage == 3:
        wanted += [(wrapper, "fp16_groups"), (wrapper, "persistent_parameters"), (param, "ds_numel")]
        wanted += [(param, "ds_shape"), (param, "partition"), (param, "all_gather")]
    else:
        part = param._hp_mapping
        wanted += [(part, "hp_fragment"), (part, "optim_fragment"), (part, "lp_fragment_address")]
        wanted += [(part.lp_fragment_address, "start"), (part.lp_fragment_address, "numel")]
    return [name for place, name in wanted if not hasattr(place, name)]


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_the_built_optimizer_has_the_names_we_use(run_distributed: Any, stage: int, precision: str) -> None:
    assert run_distributed(private_names, 1, stage, precision) == [[]]
