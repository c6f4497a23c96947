"""The predicted step against what one H200 took, and against arithmetic by hand."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_zebra.config.load import load_config
from megatron_zebra.config.sections import Config
from megatron_zebra.model.architecture import Architecture, resolve
from megatron_zebra.parallel.layout import Layout
from megatron_zebra.pipeline.split import stages_of
from megatron_zebra.planning.devices import DEVICES
from megatron_zebra.planning.step_time import Machine, StepTime, rate, step_time

H200 = Machine(next(device for device in DEVICES if device.name == "H200"))
BILLION = {
    "model.hidden_size": 2048,
    "model.num_layers": 16,
    "model.num_heads": 16,
    "model.num_kv_heads": 4,
    "model.ffn_hidden_size": 8192,
    "model.vocab_size": 32768,
    "model.window_size": 1024,
    "data.sequence_length": 8192,
    "data.synthetic.documents": 1,
    "training.global_batch_size": 1,
    "training.recompute": "full",
}
SMOLLM2 = BILLION | {
    "model.hidden_size": 576,
    "model.num_layers": 30,
    "model.num_heads": 9,
    "model.num_kv_heads": 3,
    "model.ffn_hidden_size": 1536,
    "model.vocab_size": 49152,
    "model.tie_embeddings": True,
    "model.window_size": 512,
    "data.sequence_length": 12288,
    "training.global_batch_size": 8,
    "training.micro_batch_size": 2,
    "training.recompute": "none",
}


def opened(settings: dict[str, Any], **more: Any) -> tuple[Config, Architecture]:
    config = load_config(None, settings | {name.replace("__", "."): value for name, value in more.items()})
    return config, resolve(config.model, 0, config.data.sequence_length)


def timed(settings: dict[str, Any], gpus: int = 1, machine: Machine = H200, **more: Any) -> StepTime:
    config, arch = opened(settings, **more)
    parallel = config.parallel
    layout = Layout.of(gpus, tp=parallel.tp, cp=parallel.cp, pp=parallel.pp)
    return step_time(arch, config, layout, stages_of(config, arch), machine)


@pytest.mark.parametrize(
    ("settings", "group", "seconds", "off"),
    [(BILLION, 4, 0.187, 0.1), (BILLION, 1, 0.219, 0.1), (SMOLLM2, 4, 0.638, 0.25), (SMOLLM2, 1, 0.922, 0.25)],
    ids=["1.1B Zebra", "1.1B full", "SmolLM2 Zebra", "SmolLM2 full"],
)
def test_a_step_is_what_an_h200_took(settings: dict[str, Any], group: int, seconds: float, off: float) -> None:
    assert timed(settings, model__layer_group_size=group).total == pytest.approx(seconds, rel=off)


def test_more_ranks_divide_the_computing_and_add_exchange() -> None:
    alone = timed(BILLION, training__global_batch_size=8)
    for axis in ("tp", "cp"):
        divided = timed(BILLION, 4, training__global_batch_size=8, **{f"parallel__{axis}": 4})
        for part in ("matrix", "attention"):
            assert divided.parts[part] == pytest.approx(alone.parts[part] / 4)
        assert sum(seconds for name, seconds in divided.parts.items() if name.startswith(axis)) > 0
        assert divided.flops == alone.flops
        assert divided.mfu < alone.mfu


@pytest.mark.parametrize(("schedule", "share"), [("1f1b", 3 / 8), ("interleaved", 3 / 16), ("zero_bubble", 3 / 16 / 3)])
def test_the_bubble_is_what_the_schedule_leaves(schedule: str, share: float) -> None:
    time = timed(BILLION, 4, training__global_batch_size=8, parallel__pp=4, parallel__pp_schedule=schedule)
    computing = sum(time.parts[name] for name in ("matrix", "attention", "elementwise"))
    assert time.parts["bubble"] == pytest.approx(share * computing)


def test_a_group_within_a_node_has_its_links_and_one_beyond_the_network() -> None:
    layout, machine = Layout(pp=2, dp=2, cp=4, tp=4), replace(H200, network=50e9)
    assert rate("tp", layout, machine) == 450e9
    assert rate("cp local", layout, machine) == 50e9  # ranks 0, 4, 8, 12
    assert rate("pp", layout, machine) == 50e9
    assert rate("data", layout, machine) == 100e9  # 0, 4 here feed the network together
    assert rate("cp local", Layout(cp=2, tp=4), machine) == 450e9


def test_the_slowest_group_counts() -> None:
    """tp 5 on nodes of 8: ranks 0-4 are on one node, 5-9 are not."""
    assert rate("tp", Layout(dp=8, tp=5), replace(H200, network=10e9)) == 10e9  # 5-9: three here, two there; 35-39: 5
    assert rate("tp", Layout(dp=8, tp=4), H200) == 450e9
    assert rate("cp global", Layout(dp=4, cp=3), H200) == 50e9  # 6, 7, 8
    assert rate("data", Layout(pp=2, dp=12), replace(H200, network=10e9)) == 40e9  # 8-11 are four


def test_contiguous_order_waits_for_the_last_rank() -> None:
    """Of 4 ranks the last has 1 - (3/4)^2 = 7/16 of a global layer's pairs, in zigzag order each a quarter."""
    zigzag, contiguous = (
        timed(BILLION, 4, model__layer_group_size=1, parallel__cp=4, parallel__cp_order=order).parts["attention"]
        for order in ("zigzag", "contiguous")
    )
    assert contiguous / zigzag == pytest.approx(7 / 4, rel=0.01)
