"""What a checkpoint says beside its tensors is checked too: behind the checksums anything may have been written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_zebra.checkpoint import layout
from megatron_zebra.errors import UserError
from tests.fuzzing.checkpoints import CONFIGS, resumed, save_run


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("plain", lambda m: m.pop("progress"), "does not say how far its run was"),
        ("plain", lambda m: m["progress"].update(step="1"), "how far its run was (step: "),
        ("plain", lambda m: m["progress"].update(consumed_rows=-1), "how far its run was (consumed_rows: "),
        ("plain", lambda m: m["progress"].update(more=1), "how far its run was (more: "),
        ("plain", lambda m: m["progress"].update(usual={"steps": -1}), "how far its run was (usual.steps: "),
        ("plain", lambda m: m.pop("architecture"), "does not say of what model it is ('architecture' is missing)"),
        ("plain", lambda m: m["architecture"].update(rope=1.5), "of what model it is (rope: "),
        ("plain", lambda m: m["architecture"].update(hidden_size=None), "of what model it is (hidden_size: "),
        ("plain", lambda m: m["architecture"].update(norm_eps=float("nan")), "of what model it is (norm_eps: "),
        ("adapters", lambda m: m.update(lora={"rank": "2"}), "does not say which adapters it has (rank: "),
        ("adapters", lambda m: m.update(lora=[1]), "does not say which adapters it has"),
    ],
)
def test_metadata_that_make_no_sense_are_one_line(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    (newest,) = save_run(tmp_path, CONFIGS[name], steps=(1,))
    index = layout.read_index(newest)
    change(index.metadata)
    (newest / layout.INDEX).write_bytes(layout.encode_index(index))
    with pytest.raises(UserError) as error:
        resumed(tmp_path, CONFIGS[name])
    assert str(error.value).startswith(f"{newest}: ")
    assert says in str(error.value)


def test_an_older_checkpoint_that_knows_less_is_taken(tmp_path: Path) -> None:
    (newest,) = save_run(tmp_path, CONFIGS["plain"], steps=(3,))
    index = layout.read_index(newest)
    del index.metadata["progress"]["usual"], index.metadata["architecture"]["nope_layers"]
    (newest / layout.INDEX).write_bytes(layout.encode_index(index))
    progress, _, _ = resumed(tmp_path, CONFIGS["plain"])
    assert progress is not None
    assert progress.step == 3
