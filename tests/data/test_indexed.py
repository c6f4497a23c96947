"""The indexed pair: Megatron's bytes, both ways, and every kind of damage named in one line."""

import json
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_zebra.data.indexed import HEADER, IndexedPair, pair_paths
from megatron_zebra.data.source import FileSource, check_vocabulary, split_documents
from megatron_zebra.data.writer import PairWriter, Vocabulary
from megatron_zebra.errors import UserError

theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")
DOCUMENTS = [[5, 6, 7], [8], [9] * 40, [10, 11]]


def vocabulary(size: int = 100) -> Vocabulary:
    return Vocabulary(size, 0, "ab" * 32, "sentencepiece", "test.model")


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, size: int = 100, force: bool = False) -> Path:
    with PairWriter(prefix, vocabulary(size), force) as writer:
        for document in documents:
            writer.add(np.array(document), [len(document)])
        writer.finish()
    return prefix


def write_theirs(prefix: Path, documents: list[list[list[int]]], dtype: type) -> None:
    """Documents of sequences, by Megatron's own builder."""
    import torch

    builder = theirs.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize(("size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_both_writers_give_the_same_bytes_and_read_each_other(tmp_path: Path, size: int, dtype: type) -> None:
    documents = [*DOCUMENTS, [size - 1]]
    write(tmp_path / "ours", documents, size)
    write_theirs(tmp_path / "theirs", [[document] for document in documents], dtype)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    read = theirs.IndexedDataset(str(tmp_path / "ours"))
    assert [read[n].tolist() for n in range(len(read))] == documents
    source = FileSource(IndexedPair(tmp_path / "theirs"), vocab_size=size)
    assert source.read(0, source.tokens).tolist() == [token for document in documents for token in document]
    assert source.bounds(0, source.tokens).tolist() == [3, 4, 44, 46, 47]


def test_a_document_of_several_sequences_is_one_document(tmp_path: Path) -> None:
    write_theirs(tmp_path / "p", [[[1, 2], [3]], [[4]], [[5], [], [6, 7]]], np.int32)
    pair = IndexedPair(tmp_path / "p")
    source = FileSource(pair)
    assert (pair.documents, source.tokens) == (3, 7)
    assert source.bounds(0, 7).tolist() == [3, 4, 7]
    assert source.document_bounds().tolist() == [0, 3, 4, 7]
    part = FileSource(pair, range(1, 3))
    assert part.read(0, part.tokens).tolist() == [4, 5, 6, 7]
    assert part.bounds(0, 4).tolist() == [1, 4]
    assert part.bounds(1, 3).tolist() == []


def test_empty_documents_are_no_bounds_of_their_own(tmp_path: Path) -> None:
    write_theirs(tmp_path / "p", [[[]], [[1, 2]], [[]], [[3]], [[]]], np.int32)
    source = FileSource(IndexedPair(tmp_path / "p"))
    assert source.bounds(0, 3).tolist() == [2, 3]
    with pytest.raises(UserError, match="hold no token: an empty data set"):
        FileSource(IndexedPair(tmp_path / "p"), range(4, 5))


def test_info_says_what_is_in_the_pair(tmp_path: Path) -> None:
    info = IndexedPair(write(tmp_path / "a.b")).info
    assert info is not None
    assert (info.documents, info.tokens, info.largest_id, info.vocab_size, info.eod_id) == (4, 46, 11, 100, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.bin", "a.b.idx", "a.b.json"]


def damage(prefix: Path, suffix: str, offset: int, data: bytes) -> None:
    with open(f"{prefix}{suffix}", "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def cut(prefix: Path, suffix: str, size: int) -> None:
    path = Path(f"{prefix}{suffix}")
    path.write_bytes(path.read_bytes()[:size])


INDEX_END = HEADER.size + 12 * 4 + 8 * 5


def edit(prefix: Path, **values: object) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: Path(f"{p}.idx").unlink(), r"p\.idx: no such file"),
        (lambda p: Path(f"{p}.bin").unlink(), r"p\.bin: no such file"),
        (lambda p: cut(p, ".bin", 50), r"p\.bin: truncated, 50 bytes, but p\.idx describes 92"),
        (lambda p: cut(p, ".bin", 0), r"p\.bin: truncated, 0 bytes"),
        (lambda p: damage(p, ".bin", 92, b"xx"), r"p\.bin: 94 bytes, but p\.idx describes 92"),
        (lambda p: cut(p, ".idx", 100), rf"p\.idx: truncated, 100 bytes, but 4 sequences .* take {INDEX_END}"),
        (lambda p: cut(p, ".idx", 20), r"p\.idx: truncated, 20 bytes"),
        (lambda p: cut(p, ".idx", 0), r"p\.idx: begins with b''"),
        (lambda p: damage(p, ".idx", 0, b"TNTIDX"), r"begins with b'TNTIDXX.*MMIDIDX"),
        (lambda p: damage(p, ".idx", 9, struct.pack("<Q", 2)), r"version 2; only version 1"),
        (lambda p: damage(p, ".idx", 17, b"\x63"), r"type code 99; allowed are \[1, 2, 3, 4, 5, 8\]"),
        (lambda p: damage(p, ".idx", 17, b"\x04"), r"92 bytes, but p\.idx describes .*int32"),
        (lambda p: damage(p, ".idx", 18, struct.pack("<Q", 1 << 40)), r"truncated"),
        (lambda p: damage(p, ".idx", INDEX_END, b"\0" * 4), r"multimodal"),
        (
            lambda p: damage(p, ".idx", HEADER.size + 16 + 8, struct.pack("<q", 1 << 40)),
            r"do not lie one after another",
        ),
        (lambda p: damage(p, ".idx", HEADER.size + 16 + 24, struct.pack("<q", 1 << 40)), r"describes"),
        (lambda p: damage(p, ".idx", HEADER.size + 16, struct.pack("<q", 2)), r"do not lie one after another"),
        (lambda p: damage(p, ".idx", INDEX_END - 8, struct.pack("<q", 3)), r"documents cover the sequences 0 to 3"),
        (lambda p: Path(f"{p}.json").write_text("{"), r"p\.json: not a description"),
        (lambda p: Path(f"{p}.json").write_text("[]"), r"p\.json: not a description"),
        (lambda p: Path(f"{p}.json").write_text('{"tokens": 3}'), r"p\.json: not a description"),
        (lambda p: Path(f"{p}.json").write_text("[" * 100_000), r"p\.json: not a description"),
        (lambda p: edit(p, vocab_size=float("inf")), r"p\.json: not a description .*vocab_size = inf"),
        (lambda p: edit(p, vocab_size=-5), r"p\.json: not a description .*vocab_size = -5"),
        (lambda p: edit(p, format_version=2), r"p\.json: format_version 2; only 1 can be read"),
        (lambda p: (Path(f"{p}.json").unlink(), Path(f"{p}.json").mkdir()), r"p\.json: cannot be read"),
    ],
)
def test_a_damaged_pair_is_one_line(tmp_path: Path, harm, message: str) -> None:
    harm(write(tmp_path / "p"))
    with pytest.raises(UserError, match=message) as error:
        IndexedPair(tmp_path / "p")
    assert "\n" not in str(error.value)


def test_a_file_instead_of_the_prefix_is_told(tmp_path: Path) -> None:
    write(tmp_path / "p")
    with pytest.raises(UserError, match=r"p\.bin\.idx: no such file; .*give the prefix without"):
        IndexedPair(tmp_path / "p.bin")


def test_the_json_of_another_pair_is_found(tmp_path: Path) -> None:
    write(tmp_path / "p")
    write(tmp_path / "q", [[1, 2]])
    Path(tmp_path / "q.json").rename(tmp_path / "p.json")
    with pytest.raises(UserError, match="describes 1 documents of 2 tokens, but the pair holds 4 of 46"):
        IndexedPair(tmp_path / "p")


def test_gaps_between_sequences_are_refused_when_they_are_read(tmp_path: Path) -> None:
    documents = [[n % 90] for n in range(5000)]
    write(tmp_path / "p", documents)
    hidden = HEADER.size + 4 * 5000 + 8 * 1004  # not among the sequences probed at the opening
    damage(tmp_path / "p", ".idx", hidden, struct.pack("<q", 0))
    source = FileSource(IndexedPair(tmp_path / "p"))
    assert source.read(2000, 3000).size == 1000
    with pytest.raises(UserError, match="do not lie one after another"):
        source.read(900, 1100)


def test_ids_outside_the_vocabulary_are_found_without_and_with_json(tmp_path: Path) -> None:
    pair = IndexedPair(write(tmp_path / "p"))
    assert check_vocabulary(pair, 12, "ab" * 32) is None
    with pytest.raises(UserError, match=r"p: holds id 11 .*vocab_size is 11; allowed is 12 or more"):
        check_vocabulary(pair, 11)
    with pytest.raises(UserError, match=r"written with another tokenizer \(test\.model"):
        check_vocabulary(pair, 100, "cd" * 32)
    (tmp_path / "p.json").unlink()
    pair = IndexedPair(tmp_path / "p")
    warning = check_vocabulary(pair, 11)
    assert warning is not None
    assert "no .json" in warning
    source = FileSource(pair, vocab_size=11)
    assert source.read(0, 45).size == 45
    with pytest.raises(UserError, match=r"p\.bin: token 45 is id 11, but the vocabulary has the ids 0 to 10"):
        source.read(40, 46)


@pytest.mark.parametrize("exponent", [31, 32])
def test_D05_offsets_beyond_two_and_four_gigabytes(tmp_path: Path, exponent: int) -> None:
    """Lengths whose byte sum passes 2^31 and 2^32, in a sparse file."""
    lengths = np.full(20, (1 << exponent) // 4 // 16, np.int32)
    lengths[-1] = 7
    sizes = lengths.astype(np.int64) * 4
    pointers = np.cumsum(sizes) - sizes
    assert pointers[-1] > 1 << exponent
    prefix = tmp_path / "p"
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(HEADER.pack(b"MMIDIDX\0\0", 1, 4, 20, 21))
        stream.write(lengths.tobytes() + pointers.tobytes() + np.arange(21).tobytes())
    with open(f"{prefix}.bin", "wb") as stream:
        stream.seek(int(pointers[-1]))
        stream.write(np.arange(1, 8, dtype=np.int32).tobytes())
    source = FileSource(IndexedPair(prefix))
    assert source.tokens == int(lengths.astype(np.int64).sum())
    assert source.read(source.tokens - 8, source.tokens).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert source.bounds(source.tokens - 8, source.tokens).tolist() == [source.tokens - 7, source.tokens]


def test_D05_our_writer_counts_past_two_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pointers of a corpus of 2^33 bytes; only its lengths are really written."""
    with PairWriter(tmp_path / "p", vocabulary(70000)) as writer:
        writer._idx.write(np.full(8, 1 << 28, "<i4").tobytes())
        writer._bin.truncate((1 << 28) * 8 * 4)
        writer._bin.seek(0, 2)
        writer.documents, writer.tokens, writer._largest = 8, 1 << 31, 0
        writer.finish()
    pair = IndexedPair(tmp_path / "p")
    assert pair.document_start(7) == 7 << 28
    assert int(pair.pointers[7]) == 7 << 30


def test_an_existing_pair_is_kept_unless_forced(tmp_path: Path) -> None:
    write(tmp_path / "p")
    before = (tmp_path / "p.idx").read_bytes()
    with pytest.raises(UserError, match=r"already there.*--force"):
        write(tmp_path / "p", [[1]])
    assert (tmp_path / "p.idx").read_bytes() == before
    write(tmp_path / "p", [[1]], force=True)
    assert IndexedPair(tmp_path / "p").tokens.tolist() == [1]


def test_nothing_is_left_of_a_writer_that_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ids 1 to 200"), PairWriter(tmp_path / "p", vocabulary()) as writer:
        writer.add(np.array([1, 200]), [2])
    with pytest.raises(UserError, match="nothing to write"), PairWriter(tmp_path / "p", vocabulary()) as writer:
        writer.finish()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/p\.bin\.tmp: cannot be written \(File exists\)"):
        PairWriter(tmp_path / "file" / "p", vocabulary())


def test_two_writers_of_one_pair(tmp_path: Path) -> None:
    with PairWriter(tmp_path / "p", vocabulary()) as writer:
        with pytest.raises(UserError, match="another process is writing"):
            PairWriter(tmp_path / "p", vocabulary())
        writer.add(np.array([1, 2]), [2])
        writer.finish()
    assert IndexedPair(tmp_path / "p").documents == 1


def test_opening_does_not_scan_the_corpus(tmp_path: Path) -> None:
    """A pair of 2^27 documents (1.6 GB of index, sparse) opens and is fingerprinted in a moment."""
    count = 1 << 27
    bin_path, idx_path, _ = pair_paths(tmp_path / "p")
    with open(idx_path, "wb") as stream:
        stream.write(HEADER.pack(b"MMIDIDX\0\0", 1, 8, count, count + 1))
        stream.seek(HEADER.size + 12 * count + 8 * count)
        stream.write(struct.pack("<q", count))  # the last bound; all lengths and pointers are 0, and the last:
        stream.seek(HEADER.size + 4 * count - 4)
        stream.write(struct.pack("<i", 5))
    bin_path.write_bytes(b"\0" * 10)
    start = time.process_time()
    tracemalloc.start()
    pair = IndexedPair(tmp_path / "p")
    pair.fingerprint()
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert time.process_time() - start < 5
    assert pair.documents == count


def test_splits_are_by_document_and_contiguous() -> None:
    assert split_documents(10, [0.8, 0.1, 0.1]) == [range(0, 8), range(8, 9), range(9, 10)]
    assert split_documents(5, [0.99, 0.01, 0.0]) == [range(0, 4), range(4, 5), range(5, 5)]
    assert split_documents(3, [98, 1, 1]) == [range(0, 1), range(1, 2), range(2, 3)]
    assert split_documents(2, [1, 0, 1]) == [range(0, 1), range(1, 1), range(1, 2)]
    for wrong in ([0, 0, 0], [1e308] * 3):
        with pytest.raises(UserError, match=r"data\.split"):
            split_documents(5, wrong)


def test_json_fields_are_stable(tmp_path: Path) -> None:
    write(tmp_path / "p")
    assert sorted(json.loads((tmp_path / "p.json").read_text())) == [
        "documents", "eod_id", "format_version", "largest_id", "loss_tokens", "text_bytes", "tokenizer_hash", "tokenizer_kind",
        "tokenizer_name", "tokens", "vocab_size",
    ]  # fmt: skip
