"""What a step number decides."""

import pytest

from megatron_zebra.config.derived import longest_sequence
from megatron_zebra.config.sections import Optimizer
from megatron_zebra.training.schedule import (
    global_batch_size,
    learning_rate,
    rows_before,
    sequence_phases,
)
from tests.training.cases import small


def rates(steps: int, **settings: object) -> list[float]:
    optimizer = Optimizer.model_validate({"learning_rate": 1.0, "min_learning_rate": 0.2} | settings)
    return [learning_rate(optimizer, step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_never_at_zero() -> None:
    assert rates(6, schedule="constant", warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(3, schedule="constant") == [1.0, 1.0, 1.0]


def test_linear_and_cosine_fall_from_the_peak_to_the_floor() -> None:
    linear = rates(6, schedule="linear", warmup_steps=2)
    assert linear == pytest.approx([1 / 3, 2 / 3, 1.0, 0.8, 0.6, 0.4])
    cosine = rates(6, schedule="cosine", warmup_steps=2)
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert cosine[4] == pytest.approx(0.6)  # half-way
    assert cosine[3] + cosine[5] == pytest.approx(1.2)


def test_decay_steps_count_the_warm_up_and_then_the_floor_holds() -> None:
    assert rates(8, schedule="linear", warmup_steps=2, decay_steps=6)[2:] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_wsd_is_constant_and_then_decays() -> None:
    assert rates(8, schedule="wsd", warmup_steps=1, decay_steps=4) == pytest.approx([0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4])
    assert rates(20, schedule="wsd")[17:] == pytest.approx([1.0, 1.0, 0.6])  # null: a tenth of the steps


def test_a_warm_up_as_long_as_the_run() -> None:
    for schedule in ("constant", "linear", "cosine", "wsd"):
        assert rates(2, schedule=schedule, warmup_steps=2) == pytest.approx([1 / 3, 2 / 3])


def test_the_batch_ramp_and_the_rows_before_a_step() -> None:
    config = small(training__batch_ramp=[{"steps": 2, "global_batch_size": 2}, {"steps": 3, "global_batch_size": 4}])
    sizes = [global_batch_size(config, step) for step in range(8)]
    assert sizes == [2, 2, 4, 4, 4, 8, 8, 8]
    assert [rows_before(config, step) for step in range(9)] == [sum(sizes[:step]) for step in range(9)]


def test_phases_of_the_sequence_length_count_the_rows_of_their_steps() -> None:
    config = small(
        training__batch_ramp=[{"steps": 2, "global_batch_size": 2}],
        data__sequence_schedule=[{"steps": 3, "sequence_length": 64}, {"steps": 1, "sequence_length": 16}],
    )
    assert sequence_phases(config) == [(2 + 2 + 8, 64), (8, 16), (None, 48)]
    assert longest_sequence(config) == 64
