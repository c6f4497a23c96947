"""A search finds every layout, gives a reason for each it leaves out, and ranks the rest."""

from typing import Any

import pytest

from megatron_zebra.config.check import problems
from megatron_zebra.planning.search import at_lengths, candidates, plan, search
from megatron_zebra.planning.step_time import Machine
from tests.planning.test_step_time import BILLION, H200, opened


def test_every_division_is_tried_once() -> None:
    config, _ = opened(BILLION)
    seen = [(c.parallel.tp, c.parallel.cp, c.parallel.pp) for c in candidates(config, 16, node=8)]
    want = {
        (tp, cp, pp)
        for tp in (1, 2, 4, 8)
        for cp in (1, 2, 4, 8, 16)
        for pp in (1, 2, 4, 8, 16)
        if 16 % (tp * cp * pp) == 0
    }
    assert len(seen) == len(set(seen))
    assert set(seen) == want


def test_what_fits_is_ranked_and_the_rest_has_a_reason() -> None:
    config, arch = opened(BILLION, training__global_batch_size=8, data__sequence_length=65536)
    small = Machine(H200.device.__class__(**vars(H200.device) | {"memory_bytes": 14 * 2**30}))
    plans, refused = search(arch, config, 16, small)
    tried = list(candidates(config, 16, 8))
    assert len(plans) + sum(map(len, refused.values())) == len(tried)
    assert plans
    assert len(refused) > 1
    assert [p.time.total for p in plans] == sorted(p.time.total for p in plans)
    for found in plans:
        assert found.memory.total <= small.device.memory_bytes
        assert not problems(found.config, 16)
        again = plan(arch, found.config, 16, small)
        assert (again.time, again.memory) == (found.time, found.memory)
    memory = next(configs for reason, configs in refused.items() if "memory" in reason)
    assert all(plan(arch, c, 16, small).memory.total > small.device.memory_bytes for c in memory)


def test_a_zebra_gains_with_length() -> None:
    config, arch = opened(BILLION, training__global_batch_size=8)
    found, refused = at_lengths(arch, config, 1, H200, [8192, 65536, 262144])
    assert not refused
    gains = [zebra.time.tokens_per_second / full.time.tokens_per_second for zebra, full in found.values()]
    assert gains == sorted(gains)
    assert gains[0] > 1
    assert 2.5 < gains[-1] < 4  # L = 4
    assert all(zebra.time.tokens == 65536 or length > 65536 for length, (zebra, _) in found.items())
    assert all(zebra.memory.total == pytest.approx(full.memory.total, rel=0.01) for zebra, full in found.values())


@pytest.mark.parametrize(
    "more",
    [
        {"training__recompute": "none", "parallel__pp_schedule": "interleaved"},
        {"evaluation__tasks": [{"task": "retrieval", "interval": 10}]},
        {"training__lora": {"rank": 8}, "optimizer__offload": True},
    ],
    ids=["interleaved", "evaluation tasks", "adapters"],
)
def test_training_takes_what_is_ranked_as_it_was_judged(more: dict[str, Any]) -> None:
    config, arch = opened(BILLION, training__global_batch_size=24, **({"data__sequence_length": 32768} | more))
    small = Machine(H200.device.__class__(**vars(H200.device) | {"memory_bytes": 16 * 2**30}))
    plans, _ = search(arch, config, 12, small)
    assert plans
    for found in plans:
        assert not problems(found.config, 12)
        again = plan(arch, found.config, 12, small)
        assert (again.stages, again.time, again.memory) == (found.stages, found.time, found.memory)
