"""torchrun, but for its end: one line instead of a traceback, and the exit code of the process that failed first."""

import signal
import sys
from collections.abc import Sequence

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

from megatron_zebra.launching.supervise import LOST


def main(words: Sequence[str]) -> int:
    """Run torchrun with ``words``; its exit code: the failed process's, or 1 where that died of a signal; LOST."""
    try:
        run(parse_args(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        _say(f"rank {rank} {how}")
        return max(code, 1)
    except SignalException as error:
        return 128 + int(error.sigval)
    except (RendezvousError, DistError) as error:
        _say(f"the nodes have lost touch: {' '.join(str(error).splitlines()[:1])}")
        return LOST
    return 0


def _say(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
