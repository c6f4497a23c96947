#!/usr/bin/env python
"""What a training run needs and how long it should take, before any GPU is rented.

  python tools/plan.py --config my.yaml --gpus 64 --gpu h100                     the layout that my.yaml asks for
  python tools/plan.py --config my.yaml --gpus 64 --gpu h100 --search            every layout, ranked
  python tools/plan.py --config my.yaml --gpus 64 --gpu h100 --tokens 2e9 --lengths 8192 32768 131072 --output plan.png
  python tools/plan.py --config my.yaml --gpus 64 --gpu h100 --parallel.cp 8 --training.recompute full

Overrides are those of pretrain_zebra.py. Memory and bytes are the formulas of its dry run. Times are a roofline whose constants
were fitted on one H200: good for choosing, not for promising. Nothing but the configuration is read, no data and no model;
one that a recipe would load must have its sizes in the model section.

The exit code is 0, also where the layout that is asked for does not fit, which a line at the end says; 1 where --search finds
none that fits; 2 for a mistake.
"""

import argparse
import sys
from math import inf

from megatron_zebra.config import check, load
from megatron_zebra.config.derived import longest_sequence
from megatron_zebra.config.sections import Config
from megatron_zebra.data.arguments import check_picture, output_name
from megatron_zebra.errors import UserError, run_tool
from megatron_zebra.planning.devices import DEVICES

MOST_GPUS = 2**17  # a search divides them in every way


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--config", required=True, metavar="FILE", help="the run's YAML file, as for pretrain_zebra.py")
    top.add_argument("--gpus", type=int, required=True, metavar="N", help="in all")
    top.add_argument("--gpu", required=True, metavar="KIND", help=", ".join(device.name.lower() for device in DEVICES))
    top.add_argument("--node", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)")
    top.add_argument(
        "--network", type=float, default=400.0, metavar="GBIT", help="Gbit/s of each GPU to other nodes (default: 400)"
    )
    top.add_argument("--search", action="store_true", help="rank every layout that fits, and say why others do not")
    top.add_argument("--show", type=int, default=15, metavar="N", help="layouts shown of a search (default: 15)")
    top.add_argument("--tokens", type=float, metavar="N", help="also the days that so many take (default: the run's)")
    top.add_argument(
        "--lengths", type=int, nargs="+", metavar="S", help="Zebra beside full attention at these sequence lengths"
    )
    top.add_argument(
        "--output", type=output_name, metavar="FILE", help="the comparison of --lengths as a picture, .png or .svg"
    )
    return top


def main() -> None:
    arguments, words = parser().parse_known_args()
    for name in ("gpus", "node", "network", "show", "tokens"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < inf:
            raise UserError(f"--{name} {value}: must be above 0, and finite")
    if arguments.gpus > MOST_GPUS:
        raise UserError(f"--gpus {arguments.gpus}: must be at most {MOST_GPUS}")
    if arguments.lengths and min(arguments.lengths) < 1:
        raise UserError(f"--lengths {min(arguments.lengths)}: must be 1 or more")
    if arguments.output and not arguments.lengths:
        raise UserError("--output: draws the comparison of --lengths, which is not given")
    if arguments.output:
        check_picture(arguments.output)
    device = next((device for device in DEVICES if device.name.lower() == arguments.gpu.lower()), None)
    if device is None:
        raise UserError(f"--gpu {arguments.gpu}: is not known (allowed: {', '.join(d.name.lower() for d in DEVICES)})")
    line = load.parse_words(words)
    if line.dry_run or line.world_size:
        raise UserError(f"{'--dry-run' if line.dry_run else '--world-size'}: is an option of training; use --gpus N")
    config = load.load_config(arguments.config, line.overrides)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"device": "cuda"})})
    if config.model.vocab_size is None:
        raise UserError("model.vocab_size = null: must be given to plan (no data or model is read)")
    if not arguments.search and (wrong := check.problems(config, arguments.gpus)):
        raise UserError("\nerror: ".join(wrong))
    _plan(arguments, config, device)


def _plan(arguments: argparse.Namespace, config: Config, device: object) -> None:
    from megatron_zebra.model.architecture import resolve
    from megatron_zebra.planning import table
    from megatron_zebra.planning.devices import Device
    from megatron_zebra.planning.search import at_lengths, plan, search
    from megatron_zebra.planning.step_time import Machine
    from megatron_zebra.planning.summary import run_tokens

    assert isinstance(device, Device)
    arch = resolve(config.model, 0, longest_sequence(config))
    machine = Machine(device, arguments.node, arguments.network * 1e9 / 8)
    tokens = arguments.tokens or run_tokens(config)
    print(table.heading(arch, config, arguments.gpus, machine))
    chosen = config
    if arguments.search:
        plans, refused = search(arch, config, arguments.gpus, machine)
        print(table.ranked(plans[: arguments.show], len(plans), tokens))
        print(table.refusals(refused), flush=True)
        if not plans:
            sys.exit(1)
        chosen = plans[0].config
    wanted = plan(arch, chosen, arguments.gpus, machine)
    print(table.details(wanted, arch, tokens))
    print(f"\n# in short\n  {table.in_short(wanted, tokens)}")
    if line := table.too_much(wanted, machine):
        print(line)
    if arguments.lengths:
        found, unplanned = at_lengths(arch, chosen, arguments.gpus, machine, sorted(arguments.lengths))
        print(table.by_length(found, unplanned))
        if arguments.output and not found:
            print("no picture: none of these lengths can be planned")
        elif arguments.output:
            from megatron_zebra.report.plan import write_lengths

            try:
                print(f"picture in {write_lengths(arguments.output, found, device.memory_bytes)}")
            except OSError as error:
                raise UserError(f"--output {arguments.output}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    run_tool(main)
