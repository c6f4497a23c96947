"""From documents to a file of examples; it appears under its name when it is complete."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_zebra.data.chat_template import ChatTemplate
from megatron_zebra.data.documents import documents
from megatron_zebra.data.inputs import InputOptions, find_files, read_chunks, refuse_outputs
from megatron_zebra.data.qa.build import LongQA, Texts, held_out, make_example
from megatron_zebra.errors import UserError


@dataclass(frozen=True)
class QAJob:
    """``settings`` over the documents of ``inputs`` into ``output``; every ``held_out``-th document is for valid alone."""

    inputs: list[Path]
    tokenizer: Path
    output: Path
    settings: LongQA
    options: InputOptions
    template: Path | None = None
    held_out: int = 10
    workers: int = 1
    skip_bad: bool = False
    force: bool = False


@dataclass(frozen=True)
class QAReport:
    """What became of a job: ``tokens`` of all conversations, ``documents`` of the split."""

    tokens: int
    documents: int
    bad: int
    seconds: float


def write_examples(job: QAJob) -> QAReport:
    """Write the examples; UserError, and nothing written, where that is not possible."""
    start = time.monotonic()
    files = find_files(job.inputs, job.options)
    refuse_outputs(files, [job.output])
    if job.output.exists() and not job.force:
        raise UserError(f"{job.output}: already there; choose another name, or replace with --force")
    bad: list[UserError] = []

    def on_bad(error: UserError) -> None:
        if not job.skip_bad:
            raise error
        bad.append(error)

    template = ChatTemplate(job.tokenizer, job.template)
    chunks = (chunk for file in files for chunk in read_chunks(file, job.options))
    read = [text for chunk in chunks for text in documents(chunk, job.options, on_bad) if text.strip()]
    chosen = held_out(read, job.settings.split, job.held_out)
    if not chosen:
        raise UserError(
            f"--split {job.settings.split}: none of the {len(read)} documents is of it, since every {job.held_out}th is held "
            "out; choose another --held-out, or 0 with other inputs for each split"
        )
    texts, tokens = Texts(chosen), 0
    temporary = job.output.with_name(f"{job.output.name}.tmp")

    def make(number: int) -> tuple[str, int]:
        example = make_example(job.settings, number, texts, template)
        return json.dumps(example, ensure_ascii=False) + "\n", example["meta"]["tokens"]

    try:
        with (
            temporary.open("w", encoding="utf-8") as stream,
            # Threads, since the tokenizer, where nearly all time is spent, works outside Python's lock.
            ThreadPoolExecutor(job.workers) as pool,
            tqdm(total=job.settings.examples, desc="building", unit="example", disable=None) as bar,
        ):
            try:
                for line, size in pool.map(make, range(job.settings.examples)):
                    stream.write(line)
                    tokens += size
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, job.output)
    except OSError as error:
        raise UserError(f"{job.output}: cannot be written ({error.strerror}); nothing was left there") from None
    finally:
        temporary.unlink(missing_ok=True)
    return QAReport(tokens, len(chosen), len(bad), time.monotonic() - start)
