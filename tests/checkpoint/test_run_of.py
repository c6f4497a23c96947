from pathlib import Path

import pytest

from megatron_zebra.checkpoint.locate import run_of
from megatron_zebra.convert.kept import KEPT, kept_folder


def test_the_run_is_found_from_within_it_and_through_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    (run / KEPT).mkdir(parents=True)
    (scratch / "step-1").mkdir(parents=True)
    step = run / "checkpoints" / "step-1"
    (run / "checkpoints").symlink_to(scratch)  # on another disk
    assert run_of(step) == run
    assert kept_folder(step) == run / KEPT
    (run / "checkpoints").unlink()
    step.mkdir(parents=True)
    (tmp_path / "best").symlink_to(step)
    assert kept_folder(tmp_path / "best") == run / KEPT
    for place, named in ((run, "checkpoints/step-1"), (run / "checkpoints", "step-1"), (step, ".")):
        monkeypatch.chdir(place)
        found = kept_folder(Path(named))
        assert found is not None
        assert found.samefile(run / KEPT)
    assert run_of(scratch / "step-1") is None
    assert kept_folder(scratch / "step-1") is None
