"""What a dry run prints, and that it counts tokens as training does."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zebra.config.derived import longest_sequence
from megatron_zebra.config.load import load_config
from megatron_zebra.config.sections import Config
from megatron_zebra.model.architecture import resolve
from megatron_zebra.pipeline.split import stages_of
from megatron_zebra.planning.devices import DEVICES, find_device, peak_flops
from megatron_zebra.planning.summary import dry_run_text, run_tokens
from megatron_zebra.training import schedule


def configured(**overrides: Any) -> Config:
    return load_config(None, {name.replace("__", "."): value for name, value in overrides.items()})


def dry_run(config: Config, vocab_size: int, world_size: int) -> str:
    arch = resolve(config.model, vocab_size, longest_sequence(config))
    return dry_run_text(config, arch, world_size, stages_of(config, arch))


def section(text: str, title: str) -> str:
    """The lines under ``# title...``."""
    return next(part for part in text.split("\n\n") if part.startswith(f"# {title}"))


@given(
    steps=st.integers(1, 40),
    ramp=st.lists(st.tuples(st.integers(1, 15), st.integers(1, 9)), max_size=3),
    lengths=st.lists(st.tuples(st.integers(1, 15), st.integers(2, 99)), max_size=3),
)
@settings(deadline=None)
def test_tokens_of_the_run_are_those_that_training_reads(steps: int, ramp: Any, lengths: Any) -> None:
    config = configured(
        training__steps=steps,
        training__batch_ramp=[{"steps": n, "global_batch_size": b} for n, b in ramp],
        data__sequence_schedule=[{"steps": n, "sequence_length": s} for n, s in lengths],
        data__sequence_length=64,
    )
    by_step = [s for n, s in lengths for _ in range(n)] + [64] * steps
    expected = sum(schedule.global_batch_size(config, step) * by_step[step] for step in range(steps))
    assert run_tokens(config) == expected
    assert longest_sequence(config) == max(s for _, s in schedule.sequence_phases(config))


def test_the_text_for_zebra_beside_full_attention() -> None:
    config = configured(
        training__steps=100, training__global_batch_size=16, data__sequence_length=32768, training__recompute="full"
    )
    text = dry_run(config, 32000, 8)
    assert "window_size: 512" in section(text, "resolved configuration")
    assert "█░░░█░░░" in section(text, "layers")
    assert "16 rows x 32,768 tokens" in text
    assert "524,288" in section(text, "tokens")
    assert "52,428,800" in section(text, "tokens")
    assert "2 rows, in 2 micro-batches of 1" in section(text, "ranks: 8")
    flops = section(text, "FLOPs of a step")
    for name in ("training", "forward", "if all layers were global", "computed again", "without causal cut"):
        assert f"\n  {name} " in flops
    memory = section(text, "memory of a rank")
    for name in ("weights", "gradients", "optimizer", "activations", "working memory", "allowance", "total"):
        assert f"\n  {name} " in memory
    assert max(len(line) for line in text.splitlines()) <= 130


def test_who_is_where_and_holds_what() -> None:
    layout = {"parallel__tp": 2, "parallel__cp": 2, "parallel__pp": 2, "data__sequence_length": 256}
    text = dry_run(
        configured(model__num_layers=6, model__layer_group_size=3, model__window_size=37, **layout), 1000, 16
    )
    ranks = section(text, "ranks: 16 = pp 2 x dp 2 x cp 2 x tp 2").splitlines()
    assert [line.split() for line in ranks[1:6]] == [
        ["cp", "0", "cp", "1"],
        ["pp", "0", "dp", "0", "0-1", "2-3"],
        ["dp", "1", "4-5", "6-7"],
        ["pp", "1", "dp", "0", "8-9", "10-11"],
        ["dp", "1", "12-13", "14-15"],
    ]
    assert "cp 0: 0-63 and 192-255;  cp 1: 64-191" in ranks[6]
    assert "data-parallel rank d reads rows d, d + 2" in ranks[7]
    assert "over 4 dp x cp ranks" in ranks[8]
    layers = section(text, "layers")
    assert "0-2      █░░ + embedding" in layers
    assert "3-5      █░░ + norm, head" in layers
    assert "x the mean" in layers
    received = section(text, "bytes that the busiest rank receives")
    for name in ("cp local", "cp global", "tp", "pp", "data", "total"):
        assert f"\n  {name} " in received
    assert "by pipeline rank: " in section(text, "memory of a rank")


def test_a_large_world_is_abbreviated() -> None:
    layout = {"parallel__tp": 8, "parallel__cp": 16, "parallel__pp": 20, "model__num_layers": 80}
    text = dry_run(configured(**layout, training__global_batch_size=64), 1000, 8 * 16 * 20 * 4)
    assert max(len(line) for line in text.splitlines()) <= 130
    grid = section(text, "ranks: 10240").splitlines()
    assert len(grid) < 30
    assert any("10232-10239" in line for line in grid)
    assert "..." in section(text, "layers")


def test_a_tied_head_is_counted_once() -> None:
    tied, untied = (
        section(dry_run(c, 32000, 1), "parameters") for c in (configured(model__tie_embeddings=True), configured())
    )
    assert "also the head's weight" in tied
    assert "\n  head " in untied
    assert "\n  head " not in tied


def test_peaks_of_gpus_by_the_names_torch_gives() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA GH200 480GB": 989e12,
        "NVIDIA H200": 989e12,
        "NVIDIA H20": 148e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A100-PCIE-40GB": 312e12,
        "NVIDIA A10": 125e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA GB200": 2500e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12,
        "NVIDIA GeForce RTX 4090": 165.2e12,
        "AMD Instinct MI300X": 1307e12,
    }
    assert {name: peak_flops(name) for name in names} == names
    assert peak_flops("Tesla T4") is None
    assert find_device("NVIDIA A100-PCIE-40GB") is not find_device("NVIDIA A100-SXM4-80GB")
    assert all(find_device(device.name.replace("-", " ")) for device in DEVICES if "RTX" not in device.pattern)
