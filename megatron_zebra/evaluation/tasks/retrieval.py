"""Of what is planted in long texts the share that greedy decoding finds, by task, length and depth.

passkey: one number. needle: a fact among others of its shape. needles: several numbers of one name, in the order of the
text, each counted alone. variables: a number through a chain of assignments. words: the three words that are called most
often, the commonest first; there is no depth.

A base model goes on from a prompt that ends where the answer begins; --chat asks with the tokenizer's template. Lengths
count every token, those of the answer too.

  python tools/evaluate.py retrieval --checkpoint SmolLM2-135M --text books/ --lengths 2048 4096 8192
  python tools/evaluate.py retrieval --checkpoint runs/my --tokenizer tok.model --text data/valid --tasks passkey needle
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.tasks import answers
from megatron_zebra.evaluation.tasks.answers import draw_maps, print_table
from megatron_zebra.evaluation.tasks.common import add_model, add_output, count, write_result

if TYPE_CHECKING:
    from megatron_zebra.evaluation.retrieval.run import Make, Retrieval
    from megatron_zebra.evaluation.subject import Subject

TASKS = ("passkey", "needle", "needles", "variables", "words")


def arguments(task: argparse.ArgumentParser) -> None:
    add_model(task)
    options(task)
    add_output(task, "retrieval.json", ", a picture beside it")


def options(task: argparse.ArgumentParser) -> None:
    """What is asked, whatever model it is."""
    task.add_argument(
        "--text",
        required=True,
        nargs="+",
        metavar="PATH",
        help="what things are planted in: files and folders, or prefixes of indexed pairs",
    )
    task.add_argument("--repeat", action="store_true", help="a text shorter than the context begins anew at its end")
    task.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="file or folder (default: the one kept beside the model)"
    )
    task.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="default: all")
    task.add_argument(
        "--lengths",
        nargs="+",
        type=count,
        default=[1024, 2048, 4096],
        metavar="N",
        help="tokens of the context (default: 1024 2048 4096)",
    )
    task.add_argument("--depths", type=count, default=10, metavar="N", help="equal parts of the text (default: 10)")
    task.add_argument(
        "--examples", type=count, default=10, metavar="N", help="of every task, length and depth (default: 10)"
    )
    task.add_argument(
        "--distractors", type=_whole, default=3, metavar="N", help="of the shape of what is asked for (default: 3)"
    )
    task.add_argument("--needles", type=count, default=3, metavar="N", help="numbers of the task needles (default: 3)")
    task.add_argument("--hops", type=count, default=3, metavar="N", help="from variable to variable (default: 3)")
    task.add_argument("--seed", type=_whole, default=0, metavar="N", help="default: 0")
    task.add_argument(
        "--no-bos", action="store_true", help="no beginning-of-sequence token, where the tokenizer's rules add one"
    )
    task.add_argument("--chat", action="store_true", help="ask with the tokenizer's chat template")
    task.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja template instead of the tokenizer's")


def check(arguments: argparse.Namespace) -> None:
    """UserError for what is wrong whatever the model is."""
    if arguments.chat_template and not arguments.chat:
        raise UserError("--chat-template: is for chat; give --chat too")


def rehearse(arguments: argparse.Namespace, vocab_size: int) -> None:
    """UserError for what ``measure`` would find wrong with the text and what is asked, for a model of ``vocab_size``."""
    from megatron_zebra.data.tokenizer import check_ids, load_tokenizer

    check_ids(load_tokenizer(arguments.tokenizer), arguments.tokenizer, vocab_size)
    _prepared(arguments)


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    from megatron_zebra.evaluation.load import opened
    from megatron_zebra.inference.load import tokenizer_of

    with opened(arguments, "retrieval.json") as (subject, source, output):
        arguments.tokenizer = tokenizer_of(source, arguments.tokenizer)[1]
        result = measure(subject, arguments)
        if subject.grid.is_main:
            print(f"checkpoint {source.folder}")
            for task, tables in result["tasks"].items():
                print(f"\n{task}")
                print_table(tables)
            write_result({"checkpoint": str(source.folder), **result}, output)
            print(f"\nwritten to {output}")
            draw_maps(result["tasks"], output.with_suffix(".png"))


def measure(subject: "Subject", arguments: argparse.Namespace) -> dict[str, Any]:
    """{"tasks": {name: ``evaluation.answers.tables``}}, the same on all ranks."""
    from tqdm import tqdm

    from megatron_zebra.evaluation.retrieval.run import examples_of, retrieve

    assert subject.decoder is not None
    grid, (settings, make) = subject.grid, _prepared(arguments)
    total = len(range(grid.data.rank, examples_of(settings), grid.data.size))
    with tqdm(total=total, desc="retrieval", unit="example", disable=None if grid.is_main else True, leave=None) as bar:
        found = retrieve(subject.decoder, settings, make, grid, bar.update)
    asked = {name: getattr(arguments, name) for name in ("text", "seed", "chat", "distractors", "needles", "hops")}
    return {**asked, "tasks": found}


def _prepared(arguments: argparse.Namespace) -> tuple["Retrieval", "Make"]:
    """What is asked, and what makes the examples."""
    from megatron_zebra.data.chat_template import ChatTemplate
    from megatron_zebra.data.tokenizer import load_tokenizer
    from megatron_zebra.evaluation.retrieval.run import Retrieval, example_maker
    from megatron_zebra.evaluation.retrieval.tasks import Counts

    settings = Retrieval(
        text=arguments.text,
        tasks=list(dict.fromkeys(arguments.tasks)),
        lengths=sorted(set(arguments.lengths)),
        depths=arguments.depths,
        examples=arguments.examples,
        seed=arguments.seed,
        repeat=arguments.repeat,
        counts=Counts(arguments.distractors, arguments.needles, arguments.hops),
        bos=not arguments.no_bos,
    )
    template = ChatTemplate(arguments.tokenizer, arguments.chat_template) if arguments.chat else None
    return settings, example_maker(settings, load_tokenizer(arguments.tokenizer), template)


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """What goes into metrics and tables: of each task the share of exact answers, in all and by length."""
    return {
        f"{task}/{name}": value
        for task, tables in result["tasks"].items()
        for name, value in answers.numbers(tables).items()
    }


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, not {text}")
    return int(text)
