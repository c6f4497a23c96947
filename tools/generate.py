#!/usr/bin/env python
"""Let a model go on from a prompt, or talk with it.

  python tools/generate.py --checkpoint runs/quickstart --tokenizer quickstart/tokenizer.model --prompt "def main():"
  python tools/generate.py --checkpoint SmolLM2-135M --chat --temperature 0.7 --top-p 0.9
  torchrun --nproc-per-node 2 tools/generate.py --checkpoint runs/x --prompt-file question.txt     # over two devices

The model is a training checkpoint, a run folder, a Hugging Face folder or a GGUF file. A local layer keeps the keys of its
window alone, so memory grows with the global layers only. With several processes each holds a part of the heads.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_zebra.errors import UserError, run_tool, tell
from megatron_zebra.evaluation.tasks.common import Parser


def parser() -> argparse.ArgumentParser:
    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--checkpoint", required=True, type=Path, help="a checkpoint, run or Hugging Face folder")
    top.add_argument("--tokenizer", type=Path, help="file or folder (default: the one kept beside the model)")
    top.add_argument(
        "--no-bos", action="store_true", help="no token before a prompt, where the tokenizer's rules add one"
    )
    what = top.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", metavar="TEXT", help="once for each text to go on from")
    what.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text file as the prompt")
    what.add_argument("--chat", action="store_true", help="talk, with the tokenizer's template; an empty line ends it")
    top.add_argument("--chat-template", type=Path, metavar="FILE", help="--chat: a Jinja template instead of that one")
    top.add_argument("--system", metavar="TEXT", help="--chat: the system's message")
    top.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most (default: 256)")
    top.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 = the likeliest token (default)")
    top.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    top.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the fewest tokens of this probability together"
    )
    top.add_argument("--min-p", type=float, metavar="P", help="draw from tokens of this share of the likeliest one's")
    top.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: say less twice")
    top.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end where this text comes")
    top.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    top.add_argument("--prefill-chunk", type=int, default=2048, metavar="N", help="tokens of a prompt at once")
    top.add_argument("--precision", choices=["fp32", "bf16"], help="default: bf16 on a GPU, fp32 on a CPU")
    top.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return top


def main() -> None:
    arguments = parser().parse_args()
    for name in ("max_new_tokens", "prefill_chunk"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be 1 or more")
    if "" in arguments.stop:
        raise UserError("--stop: must not be empty")
    for name in ("chat_template", "system"):
        if getattr(arguments, name) is not None and not arguments.chat:
            raise UserError(f"--{name.replace('_', '-')}: is for a talk; give --chat too")
    for name in ("prompt", "stop", "system"):
        given = getattr(arguments, name)
        for text in [given] if isinstance(given, str) else given or []:
            _check_text(text, f"--{name}")

    from megatron_zebra.convert.source import open_model
    from megatron_zebra.inference.load import check_tp, language_model, tokenizer_of
    from megatron_zebra.inference.sample import Sampling
    from megatron_zebra.launched import launched
    from megatron_zebra.parallel.process import world

    limits = {name: getattr(arguments, name) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
    sampling = Sampling(arguments.temperature, **limits)
    if problem := sampling.problem():
        name, _, rest = problem.partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {rest}")
    size = launched().world_size
    with world(arguments.device, 600.0, tp=size, named="--device") as grid:
        source = open_model(arguments.checkpoint)
        check_tp(source.architecture, size, f"{size} processes")
        tokenizer, place = tokenizer_of(source, arguments.tokenizer)
        asked = _Asked(
            arguments, source, language_model(source, grid.device, arguments.precision, grid.tp), tokenizer, sampling
        )
        if arguments.chat:
            if size > 1:
                raise UserError("--chat: runs in one process; give --prompt under torchrun")
            _chat(arguments, asked, place)
        else:
            _complete(arguments, asked, grid.is_main)


class _Asked:
    """The model, its tokenizer, and how it is asked. A text ends with any of ``stop_ids``."""

    def __init__(self, arguments: argparse.Namespace, source: Any, model: Any, tokenizer: Any, sampling: Any) -> None:
        from megatron_zebra.inference.load import stop_ids

        self.arguments, self.model, self.tokenizer, self.sampling = arguments, model, tokenizer, sampling
        self.stop_ids = stop_ids(source, tokenizer)

    def stream(self, prompts: list[list[int]]) -> tuple[list[Any], Iterator[tuple[int, str]]]:
        """What each prompt's text has come to, and (number of the prompt, text that goes on from it) as it comes. What is
        wrong is told at once."""
        from megatron_zebra.inference.text import Streamed

        arguments = self.arguments
        texts = [Streamed(self.tokenizer, prompt, arguments.stop) for prompt in prompts]
        steps = self.model.stream(
            prompts,
            arguments.max_new_tokens,
            self.sampling,
            arguments.seed,
            tuple(self.stop_ids),
            arguments.prefill_chunk,
            lambda number: not texts[number].stopped,
        )
        return texts, self._told(steps, texts)

    def _told(self, steps: Any, texts: list[Any]) -> Iterator[tuple[int, str]]:
        for step in steps:
            for number, token in enumerate(step):
                if token is not None and token not in self.stop_ids:
                    yield number, texts[number].add(token)
        yield from ((number, text.rest()) for number, text in enumerate(texts))


def _complete(arguments: argparse.Namespace, asked: _Asked, tell: bool) -> None:
    texts = arguments.prompt or [_read(arguments.prompt_file)]
    prompts = [asked.tokenizer.encode(text) for text in texts]
    for text, prompt in zip(texts, prompts):
        if not prompt:
            named = f"--prompt {text!r}" if arguments.prompt else f"--prompt-file {arguments.prompt_file}"
            raise UserError(f"{named}: is empty; at least one token is needed")
    if not arguments.no_bos:
        prompts = [[*asked.tokenizer.prefix, *prompt] for prompt in prompts]
    whole = [""] * len(texts)
    streamed, coming = asked.stream(prompts)
    if len(texts) == 1 and tell:
        print(texts[0], end="", flush=True)
    for number, text in coming:
        whole[number] += text
        if len(texts) == 1 and tell:
            print(text, end="", flush=True)
    if tell:
        if len(texts) == 1:
            print()
        else:
            for number, (text, more) in enumerate(zip(texts, whole)):
                print(f"== {number}\n{text}{more}")
        missed = sum(not text.stopped for text in streamed)
        if arguments.stop and missed:
            where = f" in {missed} of {len(texts)} texts" if len(texts) > 1 else ""
            what = f"the model's own end or after {arguments.max_new_tokens} tokens (--max-new-tokens)"
            print(f"warning: --stop: none was met{where}; ended at {what}", file=sys.stderr)


def _chat(arguments: argparse.Namespace, asked: _Asked, place: Path) -> None:
    from megatron_zebra.data.chat import Message
    from megatron_zebra.data.chat_template import ChatTemplate

    template = ChatTemplate(place, arguments.chat_template)
    asked.stop_ids |= template.end_of_turn()
    messages: list[Message] = []
    if arguments.system:
        messages.append({"role": "system", "content": arguments.system})
    while said := _said():
        messages.append({"role": "user", "content": said})
        try:
            coming = asked.stream([template.prompt(messages, "this conversation")])[1]
        except UserError as error:
            if not sys.stdin.isatty():
                raise
            tell(error)  # a person can say it otherwise, and keeps the talk
            messages.pop()
            continue
        answer = ""
        for _, text in coming:
            answer += text
            print(text, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})


def _said() -> str:
    """What the person says next; nothing at the end, or where there is no input at all."""
    if sys.stdin is None:
        return ""
    try:
        text = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError:
        raise UserError("--chat: a message must be UTF-8 text") from None
    _check_text(text, "--chat: a message")
    return text


def _check_text(text: str, named: str) -> None:
    """UserError for what came in as bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{named} {text!r}: must be UTF-8 text") from None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompt-file {file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file {file}: is not UTF-8 text") from None


if __name__ == "__main__":
    run_tool(main)
