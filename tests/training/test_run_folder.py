"""The run folder: one run at a time, and descriptions that replace any former ones."""

import errno
import fcntl
from pathlib import Path

import pytest

from megatron_zebra.errors import UserError
from megatron_zebra.training.run_folder import locked, write_description
from tests.training.cases import small


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match="another run is writing there"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_no_other_run_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        assert "no locks there (No locks available)" in capsys.readouterr().err


def test_a_former_configuration_is_kept_whatever_it_holds(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff")
    write_description(tmp_path, small(), 1, 101)
    kept = list(tmp_path.glob("config.until-*.yaml"))
    assert [path.read_bytes() for path in kept] == [b"\xff"]
    write_description(tmp_path, small(), 1, 101)
    assert list(tmp_path.glob("config.until-*.yaml")) == kept
