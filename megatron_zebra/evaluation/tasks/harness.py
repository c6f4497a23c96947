"""The standard short-context tasks, through lm-eval (EleutherAI's harness): pip install 'megatron-zebra[harness]'.

Tasks are lm-eval's, by its names (lm_eval ls tasks), or those of YAML files in the folder of --include-path. Data sets are
fetched from the Hugging Face hub, unless a task names local files. Under torchrun the processes share the questions out.
"""

import argparse
import logging
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.tasks.common import add_model, add_output, count, write_result

if TYPE_CHECKING:
    from megatron_zebra.evaluation.subject import Subject

_DEFAULT_LENGTH = 2048


def arguments(task: argparse.ArgumentParser) -> None:
    add_model(task)
    options(task)
    task.add_argument("--tp", type=count, default=1, metavar="N", help="processes that share a layer")
    add_output(task, "harness.json")


def options(task: argparse.ArgumentParser) -> None:
    """What is asked, whatever model it is."""
    task.add_argument("--tasks", required=True, nargs="+", metavar="NAME", help="tasks or groups of tasks")
    task.add_argument("--include-path", type=Path, metavar="DIR", help="folder with YAML files of further tasks")
    task.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)"
    )
    task.add_argument("--limit", type=count, metavar="N", help="questions of each task at most (default: all)")
    task.add_argument(
        "--max-length",
        type=count,
        metavar="N",
        help="tokens of a question at most (default: what the model is meant for)",
    )
    task.add_argument(
        "--batch-size", type=count, default=16, metavar="N", help="texts generated together (default: 16)"
    )
    task.add_argument("--tokenizer", type=Path, metavar="PATH", help="default: the one kept beside the model")
    task.add_argument(
        "--no-bos", action="store_true", help="no beginning-of-sequence token, where the tokenizer's rules add one"
    )


def check(arguments: argparse.Namespace) -> None:
    """UserError for what is wrong whatever the model is."""
    if find_spec("lm_eval") is None:
        raise UserError("harness: needs lm-eval: pip install 'megatron-zebra[harness]'")
    if arguments.include_path is not None and not arguments.include_path.is_dir():
        raise UserError(f"--include-path {arguments.include_path}: no such folder")
    if arguments.num_fewshot is not None and arguments.num_fewshot < 0:
        raise UserError(f"--num-fewshot {arguments.num_fewshot}: must not be negative")


def rehearse(arguments: argparse.Namespace, vocab_size: int) -> None:
    """UserError for what ``measure`` would find wrong with the tasks and their data, for a model of ``vocab_size``."""
    from megatron_zebra.data.tokenizer import check_ids, load_tokenizer

    check_ids(load_tokenizer(arguments.tokenizer), arguments.tokenizer, vocab_size)
    _load(_manager(arguments), arguments)


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    manager = _manager(arguments)
    from megatron_zebra.convert.kept import origin_of, special_ids
    from megatron_zebra.evaluation.load import opened
    from megatron_zebra.inference.load import stop_ids, tokenizer_of

    with opened(arguments, "harness.json") as (subject, source, output):
        tokenizer, arguments.tokenizer = tokenizer_of(source, arguments.tokenizer)
        origin = origin_of(source.folder)
        start = special_ids(origin).get("bos_token_id") if origin is not None else None
        result = measure(subject, arguments, stop_ids(source, tokenizer), start, manager)
        if subject.grid.is_main:
            print(f"checkpoint {source.folder}\n{told(result)}")
            write_result({"checkpoint": str(source.folder), **result}, output)
            print(f"written to {output}")


def measure(
    subject: "Subject",
    arguments: argparse.Namespace,
    ends: Collection[int] = (),
    start: int | None = None,
    manager: Any = None,
) -> dict[str, Any]:
    """{"tasks": {name: {metric: value}}}, metrics as lm-eval names them; the same on all ranks.

    Args:
        ends: tokens that end a generated text beside the tokenizer's end of document.
        start: the token before a text without a context (default: end of document).
        manager: lm-eval's, made anew by default.
    """
    from lm_eval.evaluator import evaluate

    from megatron_zebra.data.tokenizer import load_tokenizer
    from megatron_zebra.evaluation.harness import HarnessModel
    from megatron_zebra.inference.language_model import LanguageModel

    assert subject.decoder is not None
    tokenizer = load_tokenizer(arguments.tokenizer)
    model = HarnessModel(
        LanguageModel(subject.arch, subject.decoder, subject.grid.tp),
        tokenizer,
        subject.grid.data,
        sorted({tokenizer.eod_id, *ends}),
        tokenizer.eod_id if start is None else start,
        arguments.max_length or subject.arch.max_length or _DEFAULT_LENGTH,
        arguments.batch_size,
        not arguments.no_bos,
        subject.grid.is_main,
    )
    loaded = _load(manager or _manager(arguments), arguments)
    # Without bootstrapping, which forks processes; the error of a mean is given all the same.
    results: Any = evaluate(model, loaded, limit=arguments.limit, bootstrap_iters=0, log_samples=False)
    return {
        "limit": arguments.limit,
        "max_length": model.max_length,
        "num_fewshot": results["n-shot"],
        "versions": results["versions"],
        "tasks": {
            name: {metric: value for metric, value in values.items() if isinstance(value, int | float)}
            for name, values in results["results"].items()
        },
    }


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """What goes into metrics and tables: each task's metrics, without their standard errors."""
    return {
        f"{name}/{metric.removesuffix(',none')}": value
        for name, metrics in result["tasks"].items()
        for metric, value in metrics.items()
        if "_stderr" not in metric and "," in metric
    }


def told(result: dict[str, Any]) -> str:
    """For people."""
    lines = []
    for name, metrics in result["tasks"].items():
        for metric, value in metrics.items():
            if "_stderr" in metric or "," not in metric:
                continue
            kind, _, kept = metric.partition(",")
            error = metrics.get(f"{kind}_stderr,{kept}")
            spread = f" ± {error:.4f}" if isinstance(error, float) else ""
            lines.append(f"{name:30s} {metric.removesuffix(',none'):20s} {value:.4f}{spread}")
    return "\n".join(lines)


def _manager(arguments: argparse.Namespace) -> Any:
    """lm-eval's index of tasks: that of the folder alone, if it has all, since reading lm-eval's own takes seconds."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    folder = arguments.include_path
    for defaults in (False, True) if folder is not None else (True,):
        manager = TaskManager(include_path=folder, include_defaults=defaults)
        unknown = [name for name in arguments.tasks if name not in manager.task_index]
        if not unknown:
            return manager
    place = f" or in {folder}" if folder is not None else " (--include-path names a folder of further ones)"
    raise UserError(f"--tasks {unknown[0]}: no such task in lm-eval{place}; 'lm_eval ls tasks' lists its own")


def _load(manager: Any, arguments: argparse.Namespace) -> Any:
    """The tasks with their data, and as many examples before a question as asked for."""
    try:
        loaded = manager.load(arguments.tasks)
    except Exception as error:  # of many kinds, from many libraries
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--tasks {' '.join(arguments.tasks)}: cannot be loaded: {reason}") from None
    for task in loaded["tasks"].values():
        given = task.get_config("num_fewshot")
        if arguments.num_fewshot is not None and given != 0:  # a task that says 0 means it
            given = arguments.num_fewshot
        task.set_config(key="num_fewshot", value=given or 0)
        task.set_fewshot_seed(seed=1234)  # lm-eval's own
    return loaded
