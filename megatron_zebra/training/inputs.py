"""Opens and checks the data that a configuration names. Reads no token; imports no torch."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_zebra.config.sections import Config, Source
from megatron_zebra.convert.kept import tokenizer_hashes
from megatron_zebra.data.dataset import Dataset, Phase
from megatron_zebra.data.indexed import IndexedPair
from megatron_zebra.data.lengths import LengthFilter, NoDocumentLeft
from megatron_zebra.data.rows import OnePass
from megatron_zebra.data.source import (
    FileSource,
    check_fits,
    check_vocabulary,
    is_masked,
    other_tokenizer,
    split_documents,
)
from megatron_zebra.data.source import Source as TokenSource
from megatron_zebra.data.synthetic import SyntheticSource
from megatron_zebra.errors import UserError
from megatron_zebra.training.schedule import sequence_phases
from megatron_zebra.training.tasks import Planned, planned


@dataclass(frozen=True)
class Inputs:
    """Training rows by number, validation sets by name, what the data says of itself, and what else judges the model."""

    train: Dataset
    valid: dict[str, OnePass]
    vocab_size: int
    source_names: list[str]
    warnings: list[str]
    tasks: list[Planned]

    def fingerprint(self) -> list[str]:
        """Names the training data's content; a run goes on where it was only over the same."""
        return [source.fingerprint for source in self.train.sources]


def open_inputs(config: Config) -> Inputs:
    """Open every data set of ``config``.

    Raises:
        UserError: a file is missing or damaged, or does not fit the tokenizer or the vocabulary.
    """
    data = config.data
    warnings: list[str] = []
    if data.synthetic.documents:
        assert config.model.vocab_size is not None
        vocab_size, names = config.model.vocab_size, ["synthetic"]
        train, held_out = _synthetic(config)
        sources, weights = [train], [1.0]
        valid = {"synthetic": held_out} if held_out else {}
    else:
        pairs = [IndexedPair(source.prefix) for source in [*data.train, *data.valid]]
        vocab_size = _vocab_size(config, pairs)
        tokenizer_hash = _tokenizer_hash(data.tokenizer)
        warnings += filter(None, (check_vocabulary(pair, vocab_size, tokenizer_hash) for pair in pairs))
        if data.tokenizer is None and config.checkpoint.load is not None:
            beside = tokenizer_hashes(Path(config.checkpoint.load))
            warnings += filter(None, (other_tokenizer(pair, beside) for pair in pairs))
        names = []
        for source in data.train:
            names.append(_unique(_name(source), names))
        weights = [source.weight for source in data.train]
        sources, valid = _files(config, pairs, vocab_size, names, warnings)
    lengths = [length for _, length in sequence_phases(config)]
    warnings += _keep_whole(data.packing, sources, min(lengths))
    dataset = Dataset(
        sources,
        [Phase(rows, length) for rows, length in sequence_phases(config)],
        config.training.seed,
        weights,
        data.packing,
        data.attend_across_documents,
        data.cache_dir,
    )
    readers = {}
    for name, held in valid.items():
        whole = data.packing == "best_fit" and is_masked(held)
        if whole:
            check_fits(held, max(lengths))
        readers[name] = OnePass(
            held, max(lengths), config.evaluation.rows, data.attend_across_documents, whole_documents=whole
        )
    return Inputs(dataset, readers, vocab_size, names, warnings, planned(config))


def _tokenizer_hash(path: str | None) -> str | None:
    if path is None:
        return None
    from megatron_zebra.data.tokenizer import load_tokenizer  # its libraries are slow to import

    return load_tokenizer(path).hash


def _vocab_size(config: Config, pairs: list[IndexedPair]) -> int:
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    known = [pair.info.vocab_size for pair in pairs if pair.info is not None]
    if not known:
        raise UserError("model.vocab_size = null: must be given, since no data set has a .json beside it that tells")
    return max(known)


def _files(
    config: Config, pairs: list[IndexedPair], vocab_size: int, names: list[str], warnings: list[str]
) -> tuple[list[TokenSource], dict[str, TokenSource]]:
    """Training sources, and validation sources by name: those given, else the held-out share of each training source."""
    data = config.data
    count = len(data.train)
    valid: dict[str, TokenSource] = {}
    for source, pair in zip(data.valid, pairs[count:]):
        valid[_name(source)] = _within(FileSource(pair, None, _scanned(pair, vocab_size), _name(source)), source)
    train: list[TokenSource] = []
    for name, settings, pair in zip(names, data.train, pairs):
        documents, held_out, _ = split_documents(pair.documents, data.split)
        known = _scanned(pair, vocab_size)
        train.append(_within(FileSource(pair, documents if not data.valid else None, known, name), settings))
        if not data.valid and held_out:
            try:
                valid[_unique(name, valid)] = _within(FileSource(pair, held_out, known, name), settings)
            except NoDocumentLeft as error:  # a small share, and few documents are long
                warnings.append(f"no validation of {name}, since its held-out share by data.split is empty: {error}")
    return train, valid


def _within(source: TokenSource, settings: Source) -> TokenSource:
    """The source's documents of the lengths that the configuration asks for."""
    low, high = settings.min_document_tokens, settings.max_document_tokens
    return source if low is None and high is None else LengthFilter(source, low, high)


def _keep_whole(packing: str, sources: list[TokenSource], shortest: int) -> Iterator[str]:
    """UserError where best_fit would cut a conversation; warnings where concat will."""
    for source in filter(is_masked, sources):
        if packing == "best_fit":
            check_fits(source, shortest)
        else:
            yield f"{source.name}: data.packing = {packing} cuts its conversations at row ends; best_fit keeps them whole"


def _scanned(pair: IndexedPair, vocab_size: int) -> int | None:
    """Ids are checked as they are read only where no .json vouches for them."""
    return vocab_size if pair.info is None else None


def _synthetic(config: Config) -> tuple[TokenSource, TokenSource | None]:
    settings = config.data.synthetic
    documents, held_out, _ = split_documents(settings.documents, config.data.split)

    def part(which: range) -> TokenSource:
        return SyntheticSource(
            settings.documents,
            settings.mean_length,
            config.model.vocab_size or 0,
            config.training.seed,
            "synthetic",
            which,
        )

    return part(documents), part(held_out) if held_out else None


def _name(source: Source) -> str:
    return source.name or source.prefix.rstrip("/").rsplit("/", 1)[-1]


def _unique(name: str, taken: Collection[str]) -> str:
    """``name``, with a number if it is taken: sets of one name would have one loss in the metrics."""
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    return unique
