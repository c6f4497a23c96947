"""Results of two or more models side by side: a table, and a picture of their losses by position.

Each is a run (its metrics and evaluation/*.json), a model's folder with evaluation/*.json, or one such file.

  python tools/evaluate.py compare runs/full runs/zebra --output full-or-zebra.png
  python tools/evaluate.py compare before.json after.json
"""

import argparse
from pathlib import Path

from megatron_zebra.data.arguments import check_picture, output_name
from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.tasks.common import make_room, writing


def arguments(task: argparse.ArgumentParser) -> None:
    task.add_argument("results", nargs="+", type=Path, metavar="RUN_OR_JSON", help="two or more")
    task.add_argument(
        "--output",
        type=output_name,
        default=Path("comparison.png"),
        metavar="FILE",
        help="the picture, .png or .svg (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    paths, output = arguments.results, arguments.output
    if len(paths) < 2:
        raise UserError(f"{paths[0]}: is one result; two or more can be compared")
    check_picture(output)
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    from megatron_zebra.evaluation.compare import curves, read_results, table, titles

    results = [read_results(path, title) for path, title in zip(paths, titles(paths))]
    make_room(output)
    print(table(results))
    if not (drawn := curves(results)):
        print("no picture: none of them has a loss by position (tools/evaluate.py perplexity)")
        return
    from megatron_zebra.report.plots import by_position_figure
    from megatron_zebra.report.style import look, save

    with writing(output), look():
        written = save(by_position_figure(drawn, None), output)
    print(f"picture in {written}")
