"""What a launcher starts on every rank: the check of the nodes, then pretrain_zebra.py in the same process."""

import datetime
import os
import sys

import pretrain_zebra
from megatron_zebra.config import load
from megatron_zebra.errors import UserError, tell
from megatron_zebra.launched import launched
from megatron_zebra.training.run_folder import run_folder


def main(words: list[str]) -> int:
    """Returns the exit code, as pretrain_zebra.py does."""
    try:
        line = load.parse_words(words)
        config = load.load_config(line.config, line.overrides)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from megatron_zebra.launching.check import check_nodes
        from megatron_zebra.parallel.process import meeting_store

        started, timeout = launched(), config.parallel.timeout
        # Held to the end: rank 0 may keep it, and training meets there again.
        store, _ = meeting_store(started.rank, started.world_size, datetime.timedelta(seconds=timeout))
        check_nodes(store, started, config.parallel.device, run_folder(config, line.config), timeout)
    except UserError as error:
        tell(error)
        return error.code
    return pretrain_zebra.main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
