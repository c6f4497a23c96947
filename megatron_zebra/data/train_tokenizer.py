"""Training a SentencePiece tokenizer that gives every text back exactly: code, tabs, line ends and runs of spaces too."""

import io
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_zebra.data.documents import documents
from megatron_zebra.data.inputs import InputOptions, find_files, read_chunks, refuse_outputs
from megatron_zebra.data.progress import Progress
from megatron_zebra.durable import sync
from megatron_zebra.errors import UserError

_BLOCK = 2000  # characters the trainer sees at once; it gets whole lines, so that pieces may hold line ends
_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")  # ids 0 to 3


@dataclass(frozen=True)
class TokenizerJob:
    """What to train on and what to make. At most ``sample_bytes`` of text are held, drawn evenly from all of it."""

    inputs: list[Path]
    vocab_size: int
    output: Path
    model: str = "bpe"
    options: InputOptions = field(default_factory=InputOptions)
    sample_bytes: float = 1e8
    control_symbols: list[str] = field(default_factory=list)
    character_coverage: float = 0.9995
    threads: int = 1
    seed: int = 1234
    skip_bad: bool = False
    force: bool = False


@dataclass(frozen=True)
class TokenizerReport:
    """What was made, from how much text, and how many of the blocks of text it does not give back exactly."""

    vocab_size: int
    text_bytes: int
    sampled_bytes: int
    bytes_per_token: float
    changed_blocks: int
    blocks: int
    seconds: float


def train_tokenizer(job: TokenizerJob) -> TokenizerReport:
    """Write ``job.output``; UserError, and nothing written, where that is not possible."""
    import sentencepiece

    start = time.monotonic()
    _check(job)
    if job.output.exists() and not job.force:
        raise UserError(f"{job.output}: already there; choose another name, or replace it with --force")
    try:
        job.output.parent.mkdir(parents=True, exist_ok=True)  # before minutes of training, not after them
    except OSError as error:
        raise UserError(f"{job.output}: {job.output.parent}: {error.strerror}") from None
    sample, text_bytes = _sample(job)
    if not sample:
        raise UserError(f"--input: no text in {', '.join(map(str, job.inputs[:3]))}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=job.model,
            vocab_size=job.vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            # The text is taken as it is: nothing normalised, added or removed.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            character_coverage=job.character_coverage,
            max_sentence_length=8 * _BLOCK,
            unk_id=_SPECIAL.index("<unk>"),
            bos_id=_SPECIAL.index("<s>"),
            eos_id=_SPECIAL.index("</s>"),
            pad_id=_SPECIAL.index("<pad>"),
            control_symbols=job.control_symbols,
            num_threads=job.threads,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"--vocab-size {job.vocab_size}: {_advice(str(error))}") from None
    _write(job.output, model.getvalue())
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    checked = random.Random(job.seed).sample(sample, min(len(sample), 1000))
    encoded = tokenizer.EncodeAsIds(checked)
    changed = sum(tokenizer.DecodeIds(ids) != text for ids, text in zip(encoded, checked))
    return TokenizerReport(
        vocab_size=tokenizer.GetPieceSize(),
        text_bytes=text_bytes,
        sampled_bytes=sum(len(text.encode()) for text in sample),
        bytes_per_token=sum(len(text.encode()) for text in checked) / sum(len(ids) for ids in encoded),
        changed_blocks=changed,
        blocks=len(checked),
        seconds=time.monotonic() - start,
    )


def _check(job: TokenizerJob) -> None:
    """What the trainer would refuse in words of its own, or take and do something else."""
    if not 1 <= job.vocab_size < 2**31:
        raise UserError(f"--vocab-size {job.vocab_size}: must be from 1 to {2**31 - 1}")
    if not 1 <= job.sample_bytes < math.inf:
        raise UserError(f"--sample-bytes {job.sample_bytes:g}: must be a number of bytes from 1")
    if not 0.98 <= job.character_coverage <= 1:
        raise UserError(f"--character-coverage {job.character_coverage}: must be from 0.98 to 1")
    for place, token in enumerate(job.control_symbols):
        if not token or token in _SPECIAL or token in job.control_symbols[:place]:
            raise UserError(f"--control-symbols {token!r}: must be new names, other than {', '.join(_SPECIAL)}")


def _sample(job: TokenizerJob) -> tuple[list[str], int]:
    """Blocks of text, at most ``sample_bytes`` of them by reservoir sampling, and the bytes of all text."""
    generator = random.Random(job.seed)
    room = max(1, int(job.sample_bytes) // _BLOCK)
    sample: list[str] = []
    blocks, size = 0, 0
    bad = (lambda error: None) if job.skip_bad else None
    files = find_files(job.inputs, job.options)
    refuse_outputs(files, [job.output])
    with Progress("reading text", sum(file.size for file in files)) as progress:
        for file in files:
            for chunk in read_chunks(file, job.options):
                for text in documents(chunk, job.options, *([bad] if bad else [])):
                    size += len(text.encode())
                    for block in _cut(text):
                        blocks += 1
                        if len(sample) < room:
                            sample.append(block)
                        elif (place := generator.randrange(blocks)) < room:
                            sample[place] = block
                progress.update(chunk.size, f"{len(sample):,} blocks of text")
    return sample, size


def _cut(text: str) -> Iterator[str]:
    """A text in blocks of whole lines, about _BLOCK characters each; a longer line is cut."""
    start = 0
    while start < len(text):
        end = start + _BLOCK
        if end < len(text):
            line_end = text.rfind("\n", start, end) + 1
            end = line_end if line_end > start else end
        yield text[start:end].replace("\0", "")  # the trainer would leave out the whole block
        start = end


def _advice(reason: str) -> str:
    """SentencePiece's reason in one line, without the place in its source code."""
    line = " ".join(reason.split()).rpartition("] ")[2] or "training failed"
    return (
        f"{line} (the vocabulary holds 256 bytes, the special tokens and the characters of the text, and then pieces)"
    )


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            sync(stream)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
