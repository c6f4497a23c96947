"""Indexed pairs: the .idx alone, and the files beside it."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_zebra.data.dataset import Dataset, Phase
from megatron_zebra.data.indexed import HEADER, IndexedPair, pair_paths
from megatron_zebra.data.source import FileSource, check_vocabulary, split_documents
from megatron_zebra.data.writer import PairWriter, Vocabulary
from tests.fuzzing.damage import damaged_bytes, damaged_tree, few, to_json, write_number
from tests.fuzzing.subject import Outcome, Trial

VOCABULARY = 200
SEQUENCES = 300  # more than are looked at when a pair is opened
LENGTH = 64


def prepare_index(folder: Path) -> Trial:
    """Damage .idx; with .json beside it, and without."""
    return _trial(folder, _damaged_index, (".idx",))


def prepare_beside(folder: Path) -> Trial:
    """Damage .json, .bin or the loss mask."""
    return _trial(folder, _damaged_beside, (".json", ".json", ".bin", ".loss"))


def _trial(folder: Path, damage: Callable[[random.Random, str, bytes], bytes], endings: tuple[str, ...]) -> Trial:
    sound = [_write(folder / name, masked) for name, masked in (("plain", False), ("masked", True))]

    def trial(chance: random.Random) -> Outcome:
        files = chance.choice(sound)
        ending = chance.choice([ending for ending in endings if ending in files])
        prefix = folder / "damaged"
        for name in (".bin", ".idx", ".json", ".loss"):
            Path(f"{prefix}{name}").unlink(missing_ok=True)
        foreign = ".loss" not in files and ending != ".json" and chance.random() < 0.5
        for name, data in files.items():
            if not (foreign and name == ".json"):
                Path(f"{prefix}{name}").write_bytes(damage(chance, name, data) if name == ending else data)
        return _read(prefix, files)

    return trial


def _write(prefix: Path, masked: bool) -> dict[str, bytes]:
    """Documents of one to three sequences, some of them empty, as Megatron may write them."""
    rng = np.random.default_rng(0)
    with PairWriter(prefix, Vocabulary(VOCABULARY, 0, "ab" * 32, "sentencepiece", "t.model"), masked=masked) as writer:
        for length in rng.integers(0, 12, SEQUENCES).tolist():
            tokens = rng.integers(0, VOCABULARY, length)
            writer.add(tokens, [length], mask=(tokens % 3 > 0).astype(np.uint8) if masked else None)
        writer.finish()
    files = {name: Path(f"{prefix}{name}") for name in (".bin", ".idx", ".json", ".loss")}
    content = {name: path.read_bytes() for name, path in files.items() if path.exists()}
    if not masked:  # our writer makes one sequence a document
        content |= _in_longer_documents(content)
    return content


def _in_longer_documents(content: dict[str, bytes]) -> dict[str, bytes]:
    bounds = np.unique([0, *np.random.default_rng(1).integers(1, SEQUENCES, SEQUENCES // 2), SEQUENCES])
    head = HEADER.pack(*HEADER.unpack_from(content[".idx"])[:4], bounds.size)
    index = head + content[".idx"][HEADER.size : HEADER.size + 12 * SEQUENCES] + bounds.astype("<i8").tobytes()
    info = json.loads(content[".json"]) | {"documents": bounds.size - 1}
    return {".idx": index, ".json": json.dumps(info).encode()}


def _damaged_index(chance: random.Random, name: str, data: bytes) -> bytes:
    if chance.random() < 0.4:
        return damaged_bytes(chance, data)
    changed = bytearray(data)
    for _ in range(few(chance)):
        _damage_field(chance, changed)
    return bytes(changed)


def _damage_field(chance: random.Random, data: bytearray) -> None:
    """A number of the header or of one of the three arrays; two entries change places; counts that fit the size all the same."""
    count = SEQUENCES
    arrays = [("<i", HEADER.size, count), ("<q", HEADER.size + 4 * count, count)]
    arrays.append(("<q", HEADER.size + 12 * count, (len(data) - HEADER.size - 12 * count) // 8))
    kind = chance.randrange(5)
    if kind == 0:
        at, code = chance.choice(((9, "<q"), (17, "<B"), (18, "<q"), (26, "<q")))
        write_number(chance, data, at, code)
    elif kind == 1 and len(data) >= HEADER.size:
        fewer = chance.choice((-2, 2, 20, 100))
        _, _, _, sequences, bounds = HEADER.unpack_from(data)
        if fewer <= sequences < 2**63 and 3 <= bounds < 2**63:
            struct.pack_into("<QQ", data, 18, sequences - fewer, bounds + 3 * fewer // 2)
    else:
        code, start, length = chance.choice(arrays)
        size = struct.calcsize(code)
        a, b = (start + size * chance.randrange(max(1, length)) for _ in range(2))
        if kind == 2 and max(a, b) + size <= len(data):
            data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
        else:
            write_number(chance, data, a, code)


def _damaged_beside(chance: random.Random, name: str, data: bytes) -> bytes:
    if name != ".json" or chance.random() < 0.3:
        return damaged_bytes(chance, data)
    return to_json(damaged_tree(chance, json.loads(data)))


def _read(prefix: Path, sound: dict[str, bytes]) -> Outcome:
    """Read all that training reads, in pieces and in rows of both packings."""
    pair = IndexedPair(prefix)
    check_vocabulary(pair, VOCABULARY, "ab" * 32)
    assert pair.fingerprint() == pair.fingerprint()
    for documents in split_documents(pair.documents, (0.9, 0.1)):
        source = FileSource(pair, documents, VOCABULARY)
        source.cache_dir = None
        whole = source.read(0, source.tokens)
        edges = range(0, source.tokens, LENGTH)
        parts = [source.read(at, min(at + LENGTH, source.tokens)) for at in edges]
        assert np.array_equal(np.concatenate(parts), whole)
        mask = source.read_mask(0, source.tokens)
        assert mask is None or mask.size == whole.size
        bounds = np.concatenate([source.bounds(at, min(at + LENGTH, source.tokens)) for at in edges])
        assert np.array_equal(bounds, np.unique(source.document_bounds()[1:])[-bounds.size :]), (
            "bounds in pieces differ"
        )
        for packing in ("concat", "best_fit"):
            data = Dataset([source], [Phase(None, LENGTH)], 1, packing=packing)  # type: ignore[arg-type]
            for row in range(-(-source.tokens // LENGTH) + 1):
                read = data.read(row)
                assert read.tokens.size == LENGTH == read.lengths.sum()
    tokens = pair.tokens.tobytes()
    bin_path, idx_path, _ = pair_paths(prefix)
    assert tokens == bin_path.read_bytes(), "tokens that the .bin does not hold"
    whole_index = idx_path.read_bytes()
    return "same" if (whole_index, tokens) == (sound[".idx"], sound[".bin"]) else "other"
