"""A save stopped at any moment leaves a newest good checkpoint, and never half of one."""

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_zebra.checkpoint import find_latest_good, layout, open_checkpoint, save
from tests.checkpoint.cases import content_of, expected_shapes, save_step, saved, shares, state
from tests.checkpoint.crash import Killed, crashing

NEW = 100  # content of the save under test, so that a replaced step can be told from the one before


def prepare(root, half_written):
    if half_written:
        saved(save_step(root, 3))
        (root / "step-00000003" / layout.INDEX).unlink()
    for step in (1, 2):
        saved(save_step(root, step))


def attempt(root, step, ranks):
    """The save under test; by one rank, so that the order of operations is fixed, or by two."""
    if ranks > 1:
        return save_step(root, step, ranks, content=NEW, keep_last=2)
    owned = shares(state(NEW), 0, 1)
    return save(root, step, owned, {"content": NEW}, expected=expected_shapes(), keep_last=2)


@pytest.mark.parametrize("loss", ["process", "half a write", "power"])
@pytest.mark.parametrize(
    ("step", "half_written", "ranks"),
    [(3, False, 1), (3, True, 1), (2, False, 1)],
    ids=["new", "half-written before", "same step again"],
)
def test_stopped_before_any_file_operation(tmp_path, step, half_written, ranks, loss):
    stop_everywhere(tmp_path, step, half_written, ranks, loss)


def test_two_ranks_stopped_before_any_file_operation(tmp_path):
    stop_everywhere(tmp_path, 3, False, 2, "power")


def stop_everywhere(tmp_path, step, half_written, ranks, loss):
    template, root = tmp_path / "template", tmp_path / "root"
    prepare(template, half_written)
    shutil.copytree(template, root)
    with crashing(None) as whole:
        attempt(root, step, ranks)
    assert content_of(find_latest_good(root).folder) == NEW
    index_at = max(i for i, line in enumerate(whole.log) if line == "replace .index.json.tmp")
    assert whole.log.index("replace .latest.tmp") > index_at
    seen = set()
    writes = [at for at, line in enumerate(whole.log) if line.startswith("write ")]
    for stop in writes if loss == "half a write" else range(len(whole.log)):
        shutil.rmtree(root)
        shutil.copytree(template, root)
        with crashing(stop, half_write=loss == "half a write") as crash, contextlib.suppress(Killed):
            attempt(root, step, ranks)
        if loss == "power":
            crash.lose_power()
        found = find_latest_good(root)
        content = content_of(found.folder)
        assert content in (2, NEW), (stop, whole.log[stop])
        if ranks == 1:  # the checkpoint exists from the renaming of its index on; surely, once that is synced
            assert (content == NEW) == (stop > index_at + (loss == "power"))
        assert content_of(root / (root / "latest").read_text().strip()) in (2, content)  # never names a half one
        seen.add(content)
        if stop % 4 == 0 or content != 2:  # and the next start saves as if nothing had been
            attempt(root, step, ranks)
            again = find_latest_good(root).folder
            assert content_of(again) == NEW
            assert (root / "latest").read_text().strip() == again.name
    assert seen == {2, NEW}  # a write that is cut after the index is that of latest


SAVER = """
import sys
sys.path[:0] = [sys.argv[1]]
from tests.checkpoint.cases import content_of, save_step, saved
from pathlib import Path
from megatron_zebra.checkpoint import find_latest_good
root = Path(sys.argv[2])
found = find_latest_good(root)
step = found.step or 0
assert found.folder is None or content_of(found.folder) == step
print("ready", step, *found.skipped, flush=True)
while True:
    step += 1
    saved(save_step(root, step, keep_last=2))
    print(step, flush=True)
"""


def test_kill_9_at_random_moments(tmp_path):
    """Real processes: what was reported as saved is never lost, and what is found is always whole."""
    rng, reported = random.Random(0), 0
    for _ in range(15):
        command = [sys.executable, "-c", SAVER, str(Path(__file__).parents[2]), str(tmp_path / "root")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            first = process.stdout.readline().split()
            assert first[:1] == ["ready"], first
            assert int(first[1]) in (reported, reported + 1)
            time.sleep(rng.uniform(0.0, 0.15))
            process.send_signal(signal.SIGKILL)
            lines = process.stdout.read().splitlines()
        reported = int(lines[-1]) if lines else int(first[1])
        found = find_latest_good(tmp_path / "root")
        if reported == 0 and found.folder is None:
            continue
        assert content_of(found.folder) == found.step
        assert found.step in (reported, reported + 1)
        reported = found.step
    assert reported > 3
    assert open_checkpoint(tmp_path / "root" / f"step-{reported:08d}").step == reported
