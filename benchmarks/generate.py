"""Prefill and decoding against transformers, in turn in one run: tokens/s, and whether the greedy tokens agree.

  python benchmarks/generate.py --model smollm2/ --prompt 512 --new 200
  python tools/convert_checkpoint.py from-hf --hf smollm2/ --output zebra --layer-group-size 4 --window-size 512
  python tools/convert_checkpoint.py to-hf --checkpoint zebra --output zebra-hf
  python benchmarks/generate.py --model zebra-hf/ --prompt 16384 --new 32        # about ten minutes on one core

The model is a Hugging Face folder that both read, in fp32 on one thread of a CPU (its CPU time), else in bf16. The prompt is text of --data, else random
tokens. The fastest of --repeats prefills counts, and the median of the decoding steps.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import megatron_zebra
from megatron_zebra.data.indexed import IndexedPair
from megatron_zebra.data.source import FileSource
from megatron_zebra.inference.cache import Cache

clock = time.perf_counter if torch.cuda.is_available() else time.process_time  # of one thread: others disturb it less
Step = Callable[[torch.Tensor], torch.Tensor]  # the last token [1] -> logits [1, V] of the next


def ours(folder: Path, prompt: torch.Tensor) -> Callable[[], tuple[torch.Tensor, Step]]:
    model = megatron_zebra.load(folder)
    ids = prompt.to(model.device)

    def prefill() -> tuple[torch.Tensor, Step]:
        cache = Cache(1)
        return model.prefill(cache, [ids]), lambda token: model.decode(cache, token, [0])

    return prefill


def theirs(folder: Path, prompt: torch.Tensor) -> Callable[[], tuple[torch.Tensor, Step]]:
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model.to(device).eval()
    ids = prompt.to(device)[None]

    def prefill() -> tuple[torch.Tensor, Step]:
        out = model(ids, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        return out.logits[:, -1], lambda token: model(token[None], past_key_values=cache, use_cache=True).logits[:, -1]

    return prefill


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    began = clock()
    out = function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return out, clock() - began


def prompt_of(data: str | None, length: int) -> torch.Tensor:
    if data is None:
        return torch.randint(0, 1000, (length,), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(FileSource(IndexedPair(data), None, None).read(0, length).astype("int64"))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--data", metavar="P", help="prefix of an indexed pair whose first tokens are the prompt")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default: 512)")
    parser.add_argument("--new", type=int, default=200, help="tokens generated (default: 200)")
    parser.add_argument("--repeats", type=int, default=1, help="prefills of each (default: 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    prompt = prompt_of(arguments.data, arguments.prompt)
    runs = {name: run(arguments.model, prompt) for name, run in (("megatron_zebra", ours), ("transformers", theirs))}
    prefills: dict[str, list[float]] = {name: [] for name in runs}
    decodes: dict[str, list[float]] = {name: [] for name in runs}
    tokens: dict[str, list[torch.Tensor]] = {name: [] for name in runs}
    steps: dict[str, Step] = {}
    for _ in range(arguments.repeats):
        for name, prefill in runs.items():
            (logits, steps[name]), seconds = timed(prefill)
            prefills[name].append(seconds)
            tokens[name] = [logits.argmax(-1)]
    for _ in range(arguments.new - 1):  # in turn, so that what else the machine does meets both alike
        for name, step in steps.items():
            logits, seconds = timed(step, tokens[name][-1])
            decodes[name].append(seconds)
            tokens[name].append(logits.argmax(-1))
    prefill_speed = {name: len(prompt) / min(seconds) for name, seconds in prefills.items()}
    decode_speed = {name: 1 / statistics.median(seconds) for name, seconds in decodes.items()}
    print(f"{'':14}{'prefill tokens/s':>18}{'decoded tokens/s':>18}")
    for name in runs:
        print(f"{name:14}{prefill_speed[name]:>18,.1f}{decode_speed[name]:>18,.2f}")
    mine, other = runs
    print(f"{'ours / theirs':14}{prefill_speed[mine] / prefill_speed[other]:>17.2f}x", end="")
    print(f"{decode_speed[mine] / decode_speed[other]:>17.2f}x")
    a, b = (torch.cat(tokens[name]).tolist() for name in runs)
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))
    print(f"the first {same} of {len(a)} greedy tokens agree ({len(set(a))} different ones)")


if __name__ == "__main__":
    main()
