"""Weights and optimizer of single ranks, of worlds up to 512: the formulas against what is really built for that rank."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from megatron_zebra.parallel.layout import Layout
from megatron_zebra.pipeline.split import stages_of
from megatron_zebra.planning.memory import state_parts
from megatron_zebra.planning.parameters import held_parameters, weight_bytes
from tests.training.cases import opened, small

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "model__hidden_size": 64,
    "model__num_layers": 8,
    "model__num_heads": 8,
    "model__num_kv_heads": 4,
    "model__ffn_hidden_size": 128,
    "model__vocab_size": 1003,
    "training__global_batch_size": 512,
}
LAYOUTS: list[tuple[int, dict[str, int], int]] = [
    (1, {}, 0),
    (16, {}, 1),
    (16, {}, 2),
    (16, {}, 3),
    (512, {}, 1),
    (8, {"tp": 8}, 1),
    (64, {"tp": 4}, 3),
    (64, {"cp": 8}, 2),
    (64, {"pp": 4}, 1),
    (128, {"tp": 2, "cp": 4}, 3),
    (256, {"tp": 4, "pp": 8}, 1),
    (512, {"tp": 8, "cp": 4, "pp": 4}, 1),
]


PADDED = 3 * 4 * 16  # masters and two moments of the elements that let all parts of the two flat groups be equal


def test_P12_weights_and_optimizer_of_twelve_layouts() -> None:
    """In both precisions, of the first and the last rank of each; exact but for DeepSpeed's padding."""
    cases: list[dict[str, Any]] = []
    planned = []
    for precision, (world, axes, stage) in product(("fp32", "bf16"), LAYOUTS):
        settings = SIZES | {"optimizer__zero_stage": stage, "training__precision": precision}
        settings |= {f"parallel__{axis}": size for axis, size in axes.items()}
        config = small(**settings)
        arch, _ = opened(config)
        layout, stages = Layout.of(world, **axes), stages_of(config, arch)
        for rank in sorted({0, world - 1}):
            cases.append({"rank": rank, "world": world, "axes": axes, "settings": settings})
            parameters, trained = held_parameters(arch, config.parallel, stages, layout.coordinates(rank).pp)
            e = weight_bytes(config)
            weights, _, optimizer = state_parts(parameters, e, stage, layout.dp * layout.cp, trained)
            gathered = parameters * e if stage == 3 else 0  # for use, and gone again
            even = parameters % (2 * layout.dp * layout.cp) == 0 or stage == 0
            planned.append((weights.bytes - gathered, optimizer.bytes, 0 if even else PADDED))
    done = subprocess.run(
        [sys.executable, "-m", "tests.planning.fake_ranks"],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for case, (weights, optimizer, padding), found in zip(
        cases, planned, json.loads(done.stdout.splitlines()[-1]), strict=True
    ):
        assert found["weights"] == weights, case
        assert optimizer <= found["optimizer"] <= optimizer + padding, (case, optimizer)
