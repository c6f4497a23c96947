"""Reading text: every format, compressed or not, in any cut into chunks; every fault with its file and line."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_zebra.data import inputs
from megatron_zebra.data.documents import documents
from megatron_zebra.data.inputs import InputOptions, find_files, read_chunks
from megatron_zebra.errors import UserError
from tests.data.corpus import patient

TEXTS = ["one\nline two\n", "", "ünï 🦓", "  spaces  ", "x" * 3000]


def read(path: Path, skip: bool = False, **options) -> list[str]:
    chosen = InputOptions(**options)
    found, bad = [], []
    for file in find_files([path], chosen):
        size = 0
        for chunk in read_chunks(file, chosen):
            found += documents(chunk, chosen, *([bad.append] if skip else []))
            size += chunk.size
        assert size == file.size  # the bar ends full
    return [*found, *map(str, bad)]


@pytest.fixture(params=[7, 1 << 20], ids=["blocks of 7 bytes", "blocks of 1 MB"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(inputs, "_BLOCK", request.param)
    return request.param


def compress(path: Path, how: str) -> Path:
    if not how:
        return path
    data = path.read_bytes()
    if how == ".gz":
        packed = gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])  # two members
    else:
        make = zstandard.ZstdCompressor()
        packed = make.compress(data[:5]) + make.compress(data[5:])  # two frames
    path.unlink()
    path = path.with_name(path.name + how)
    path.write_bytes(packed)
    return path


@pytest.mark.parametrize("how", ["", ".gz", ".zst"])
def test_json_lines(tmp_path: Path, block: int, how: str) -> None:
    lines = [json.dumps({"text": text, "n": n}, ensure_ascii=n % 2 == 0) for n, text in enumerate(TEXTS)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(lines).encode())  # a byte-order mark, empty lines, none at the end
    assert read(compress(path, how)) == TEXTS


@pytest.mark.parametrize("how", ["", ".gz", ".zst"])
def test_parquet(tmp_path: Path, how: str) -> None:
    texts = TEXTS * 200
    table = pyarrow.table({"text": [*texts, None], "n": list(range(len(texts) + 1))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(compress(tmp_path / "a.parquet", how)) == [*texts, ""]


@pytest.mark.parametrize("how", ["", ".gz", ".zst"])
def test_plain_text(tmp_path: Path, block: int, how: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo\n\n \t\nthree ü\n  four\n\n\n\nfive".encode())
    path = compress(path, how)
    assert read(path) == ["one\r\ntwo\n\n \t\nthree ü\n  four\n\n\n\nfive"]
    assert read(path, boundary="line") == ["one", "two", "", " \t", "three ü", "  four", "", "", "", "five"]
    assert read(path, boundary="blank-line") == ["one\r\ntwo", "three ü\n  four", "five"]


@patient
@example("aa\n\n \na", 2)  # a chunk that begins with a blank line
@given(st.text(st.sampled_from("a \n\r\tü"), max_size=60), st.integers(1, 9))
def test_chunks_do_not_show(tmp_path_factory: pytest.TempPathFactory, text: str, block: int) -> None:
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_text(text, newline="")
    before = inputs._BLOCK
    try:
        for boundary in ("file", "line", "blank-line"):
            inputs._BLOCK = 1 << 20
            whole = read(path, boundary=boundary)
            inputs._BLOCK = block
            assert read(path, boundary=boundary) == whole
    finally:
        inputs._BLOCK = before


def test_folders_are_sorted_and_searched_to_any_depth(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a/b/c.txt", ".hidden/x.py", "a/.y.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a/b/c.txt", "a/z.py", "b.py"]
    assert read(tmp_path, glob="*.py") == ["a/z.py", "b.py"]
    with pytest.raises(UserError, match=r"without a file that matches '\*\.md'"):
        read(tmp_path, glob="*.md")
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path / "none")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a\.jsonl, line 3: not JSON"),
        (b"plain", r"line 3: not JSON"),
        (b'{"text": "\xff"}', r"line 3: not UTF-8 \(byte 0xff\)"),
        (b'["a"]', r"line 3: list instead of an object"),
        (b'{"content": "a", "id": 1}', r"line 3: no key 'text'; there are content, id \(--text-key\)"),
        (b'{"text": ["a"]}', r"line 3: key 'text' holds list instead of text"),
        (b'{"text": "\\ud83d"}', r"line 3: .*half of a surrogate pair"),
        (b"[" * 100_000, r"line 3: not JSON"),
    ],
)
def test_bad_json_lines(tmp_path: Path, block: int, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert "\n" not in str(error.value)
    kept = read(path, skip=True)
    assert kept[:2] == ["a", "b"]
    assert "line 3" in kept[2]


def test_bad_plain_text(tmp_path: Path, block: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nthr\xe9e\nfour\n")
    for boundary in ("file", "line", "blank-line"):
        with pytest.raises(UserError, match=r"a\.txt, line 3: not UTF-8 \(byte 0xe9\)"):
            read(path, boundary=boundary)
    assert read(path, skip=True, boundary="line")[:3] == ["one", "two", "four"]


def test_bad_compressed_files(tmp_path: Path) -> None:
    data = b"".join(b"line %d\n" % n for n in range(5000))
    for name, content in (
        ("cut.txt.gz", gzip.compress(data)[:-20]),
        ("cut.txt.zst", zstandard.compress(data)[:-5]),
        ("not.txt.gz", data),
        ("not.txt.zst", data),
        ("not.parquet", data),
        ("empty.parquet", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: cannot be read") as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


def test_bad_parquet_columns(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a": [1], "b": ["x"]}), tmp_path / "p.parquet")
    assert read(tmp_path / "p.parquet", key="b") == ["x"]
    with pytest.raises(UserError, match=r"no column 'text'; there are a, b \(--text-key\)"):
        read(tmp_path / "p.parquet")
    with pytest.raises(UserError, match="column 'a' holds int64, not text"):
        read(tmp_path / "p.parquet", key="a")
