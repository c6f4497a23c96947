#!/usr/bin/env python
"""Make one HTML page of one or more runs: losses, speed, memory, context, checkpoints, several runs in the same charts.

The page holds all it needs and opens from disk without a network. A run may still be going on.

  python tools/report.py runs/my
  python tools/report.py runs/zebra runs/full --output compared.html
"""

import argparse
from pathlib import Path

from megatron_zebra.data.arguments import output_name
from megatron_zebra.errors import UserError, run_tool


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders (logging.run_dir of training)")
    top.add_argument("--output", type=output_name, metavar="F", help="page (default: report.html in the first RUN)")
    return top


def main() -> None:
    arguments = parser().parse_args()
    from megatron_zebra.report.folder import read_runs

    runs = read_runs(arguments.runs)
    output = arguments.output or arguments.runs[0] / "report.html"
    from megatron_zebra.report.page import write_report

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_report(runs, output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    run_tool(main)
