"""A node is lost in the middle of a step and returns: launch/rehearsal.py, with one process a node."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_is_lost_and_returns(tmp_path: Path) -> None:
    """In network namespaces where they are allowed, else on two addresses of this machine; it says which."""
    command = [sys.executable, "launch/rehearsal.py", "--tp", "1", "--power-cut", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert "rank 1 (pp 0, dp 1, cp 0, tp 0) on " in done.stdout
    assert "resumed at step 5" in done.stdout
    assert done.stdout.endswith("equal the uninterrupted run's, bit for bit\n")
