"""From text to an indexed pair: one process reads and writes, several tokenize, the order of documents stays."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait

from megatron_zebra.data.encode import Encode, Encoded, Job, make_encoder
from megatron_zebra.data.indexed import PairInfo, mask_path, pair_paths
from megatron_zebra.data.inputs import Chunk, InputFile, InputOptions, find_files, read_chunks, refuse_outputs
from megatron_zebra.data.progress import Progress
from megatron_zebra.data.tokenizer import load_tokenizer
from megatron_zebra.data.writer import PairWriter, Vocabulary
from megatron_zebra.errors import UserError

_TASK = 1 << 19  # bytes of input a worker gets at once, at least
_AHEAD = 3  # tasks a worker that may be under way


@dataclass
class Report:
    """What became of a job."""

    info: PairInfo
    empty: int
    bad: int
    first_bad: str
    dropped: int  # conversations, for their length
    truncated: int
    seconds: float


def preprocess(job: Job) -> Report:
    """Write the pair ``job.prefix`` and say what was done; UserError, and nothing written, where that is not possible."""
    start = time.monotonic()
    if job.workers < 1:
        raise UserError(f"--workers {job.workers}: at least 1 is needed")
    files = find_files(job.inputs, job.options)
    refuse_outputs(files, [*pair_paths(job.prefix), mask_path(job.prefix)])
    tokenizer = load_tokenizer(job.tokenizer, job.eod_token)
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.eod_id, tokenizer.hash, tokenizer.kind, tokenizer.name)
    encode = make_encoder(job, tokenizer)
    empty, bad, first_bad, dropped, truncated = 0, 0, "", 0, 0
    try:
        with (
            PairWriter(job.prefix, vocabulary, job.force, masked=job.chat is not None) as writer,
            Progress("tokenizing", sum(file.size for file in files)) as progress,
        ):
            for part in _encode_all(job, encode, files):
                writer.add(part.tokens, part.lengths, part.text_bytes, part.mask)
                empty, bad = empty + part.empty, bad + len(part.bad)
                dropped, truncated = dropped + part.dropped, truncated + part.truncated
                first_bad = first_bad or (part.bad[0] if part.bad else "")
                progress.update(part.size, f"{writer.tokens / 1e6:.2f}M tokens")
            info = writer.finish()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"{job.prefix}: writing failed ({reason}); nothing was left there, the input is as it was"
        ) from None
    return Report(info, empty, bad, first_bad, dropped, truncated, time.monotonic() - start)


def _tasks(files: list[InputFile], options: InputOptions) -> Iterator[list[Chunk]]:
    """Chunks in order, small ones together."""
    task: list[Chunk] = []
    size = 0
    for file in files:
        for chunk in read_chunks(file, options):
            task.append(chunk)
            size += len(chunk.data) if isinstance(chunk.data, bytes) else sum(len(text or "") for text in chunk.data)
            if size >= _TASK:
                yield task
                task, size = [], 0
    if task:
        yield task


def _encode_all(job: Job, encode: Encode, files: list[InputFile]) -> Iterator[Encoded]:
    """The documents of all files, tokenized, in order."""
    tasks = _tasks(files, job.options)
    if job.workers == 1:
        for task in tasks:
            yield encode(task)
        return
    context = multiprocessing.get_context("spawn")  # a fork would share the threads of the tokenizer's library
    pool = ProcessPoolExecutor(job.workers, context, _start_worker, (job,))
    try:
        under_way: deque[Future[Encoded]] = deque()
        for task in tasks:
            under_way.append(pool.submit(_encode_in_worker, task))
            if len(under_way) >= job.workers * _AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"{job.prefix}: a worker process was killed, perhaps for want of memory: try fewer --workers than {job.workers}"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: Encode | None = None


def _start_worker(job: Job) -> None:
    """Open the tokenizer in a new process, which is to end with the one that started it, however that ends."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it
    _worker = make_encoder(job)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()


def _encode_in_worker(task: list[Chunk]) -> Encoded:
    assert _worker is not None
    return _worker(task)
