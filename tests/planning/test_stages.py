"""What a pipeline rank holds at its fullest, against the order in which torch's schedules run."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules

from megatron_zebra.pipeline.split import stage_ranks
from megatron_zebra.planning.stages import Stages, in_flight


def order(schedule: str, pp: int, per_rank: int, micro_batches: int, rank: int) -> list[tuple[str, int]]:
    """(what, stage) of each computation of ``rank``: F is a forward, B and W release its activations."""
    if schedule == "1f1b":
        forward = min(micro_batches, pp - rank)
        steady = [("B", rank), ("F", rank)] * (micro_batches - forward)
        return [("F", rank)] * forward + steady + [("B", rank)] * forward
    me: Any = SimpleNamespace(
        pp_group_size=pp,
        _n_microbatches=micro_batches,
        num_stages=pp * per_rank,
        n_local_stages=per_rank,
        microbatches_per_round=micro_batches // max(1, micro_batches // pp),
    )
    kind: Any = {"interleaved": schedules.ScheduleInterleaved1F1B, "zero_bubble": schedules.ScheduleZBVZeroBubble}
    actions = kind[schedule]._calculate_single_rank_operations(me, rank)
    return [(str(action.computation_type.value), action.stage_index) for action in actions if action is not None]


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize(
    ("schedule", "per_rank"), [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero_bubble", 2)]
)
def test_micro_batches_in_flight(schedule: str, per_rank: int, pp: int) -> None:
    ranks = stage_ranks(pp, per_rank, v=schedule == "zero_bubble")
    stages = Stages(tuple(range(i, i + 1) for i in range(len(ranks))), (1,) * len(ranks), tuple(ranks))
    for micro_batches in (1, 2, pp, 2 * pp, 4 * pp):
        if schedule == "1f1b" and micro_batches < pp:
            continue
        for rank in range(pp):
            alive: Counter[int] = Counter()
            most = 0
            for what, stage in order(schedule, pp, per_rank, micro_batches, rank):
                alive[stage] += {"F": 1, "B": -1, "W": -1}.get(what, 0)
                most = max(most, alive.total())
            planned = in_flight(stages, schedule, micro_batches, rank)
            assert list(planned) == stages.of_rank(rank)
            if schedule == "zero_bubble" and micro_batches < 2 * pp:
                assert most <= sum(planned.values())  # the stages are fullest at different moments
            else:
                assert most == sum(planned.values()), (micro_batches, rank)
            assert max(planned.values()) <= micro_batches


def test_without_a_pipeline_one_micro_batch_is_held() -> None:
    for schedule in ("1f1b", "interleaved", "zero_bubble"):
        assert in_flight(Stages.whole(4), schedule, 8, 0) == {0: 1}
