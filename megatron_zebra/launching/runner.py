"""DeepSpeed's launcher, but what stops it before it has started anything is one line instead of a traceback."""

import subprocess
import sys
from collections.abc import Sequence

from deepspeed.launcher import runner

from megatron_zebra.launching.supervise import MISTAKE

# What it raises over its options, the hostfile, ssh and pdsh; once processes run it only ends with their exit code.
ITS_ERRORS = (RuntimeError, ValueError, AssertionError, OSError, subprocess.CalledProcessError)


def main(words: Sequence[str]) -> int:
    """Run DeepSpeed's launcher with ``words``; MISTAKE where it cannot begin."""
    try:
        runner.main(list(words))
    except ITS_ERRORS as error:
        print(f"error: deepspeed: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
