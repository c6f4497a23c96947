"""The checkpoint tests do not wait for the disk: what syncing is for is simulated (crash.py) or done by real processes."""

import pytest

from megatron_zebra.checkpoint import files


@pytest.fixture(autouse=True, scope="module")
def _without_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sync", lambda file: None)
        patch.setattr(files, "sync_folder", lambda path: None)
        yield
