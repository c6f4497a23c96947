"""tools/train_tokenizer.py and tools/preprocess_data.py as their users run them."""

import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_zebra.data.encode import Job
from megatron_zebra.data.indexed import IndexedPair
from megatron_zebra.data.preprocess import preprocess
from megatron_zebra.data.source import FileSource
from megatron_zebra.data.tokenizer import load_tokenizer
from megatron_zebra.errors import UserError

ROOT = Path(__file__).parents[2]
TEXTS = [Path(__file__).read_text() * (1 + n % 3) for n in range(30)] + ["", " \n", "short", "ünï 🦓"]


def tool(name: str, *args: str | Path, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def fails(name: str, *args: str | Path, **options) -> str:
    """The one line of a user's mistake."""
    done = tool(name, *args, **options)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.jsonl and t.model, made by the tool."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    done = tool("train_tokenizer", "--input", folder / "a.jsonl", "--vocab-size", 600, "--output", folder / "t.model")
    assert done.returncode == 0, done.stderr
    assert "600 tokens" in done.stdout
    assert done.stderr == ""
    return folder


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_help_teaches_and_is_quick() -> None:
    for name in ("train_tokenizer", "preprocess_data"):
        start = time.perf_counter()
        done = tool(name, "--help")
        assert time.perf_counter() - start < 5
        assert done.returncode == 0
        for word in ("--input", "examples:", f"python tools/{name}.py", "--text-key", "default"):
            assert word in done.stdout


def test_tools_import_no_torch(data: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megatron_zebra.data.encode import Job; from megatron_zebra.data.preprocess import preprocess; "
        f"preprocess(Job([Path({str(data / 'a.jsonl')!r})], Path({str(data / 't.model')!r}), Path({str(tmp_path / 'p')!r}))); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_bytes_do_not_depend_on_the_workers(data: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        done = tool(
            "preprocess_data", "--input", data / "a.jsonl", "--tokenizer", data / "t.model", "--workers", workers,
            "--output-prefix", tmp_path / f"p.{workers}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "32 documents" in done.stdout
        assert "2 empty documents were left out" in done.stdout
    for suffix in (".bin", ".idx", ".json"):
        assert len({(tmp_path / f"p.{workers}{suffix}").read_bytes() for workers in (1, 2, 3)}) == 1
    assert len(files_of(tmp_path)) == 9
    pair = IndexedPair(tmp_path / "p.1")
    source, tokenizer = FileSource(pair), load_tokenizer(data / "t.model")
    bounds = source.document_bounds()
    read = [source.read(int(first), int(last)) for first, last in pairwise(bounds)]
    assert [tokenizer.decode(tokens[:-1]) for tokens in read] == [text for text in TEXTS if text.strip()]
    assert {int(tokens[-1]) for tokens in read} == {tokenizer.eod_id}
    assert pair.info is not None
    assert pair.info.largest_id == max(int(tokens.max()) for tokens in read)
    assert (pair.info.tokenizer_hash, pair.info.vocab_size) == (tokenizer.hash, 600)


def test_options(data: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt.gz").write_bytes(gzip.compress(b"first\n\nsecond\n\n\n"))
    (tmp_path / "in" / "b.txt").write_bytes(b"third\n\nfou\xffrth")
    args = ("--input", tmp_path / "in", "--tokenizer", data / "t.model", "--output-prefix", tmp_path / "p", "--no-eod")
    line = fails("preprocess_data", *args, "--split-documents", "blank-line")
    assert line.endswith("b.txt, line 3: not UTF-8 (byte 0xff)")
    done = tool("preprocess_data", *args, "--split-documents", "line", "--skip-bad", "--workers", 2)
    assert "1 unreadable documents were left out, the first: " in done.stdout
    assert "3 documents" in done.stdout
    tokens = IndexedPair(tmp_path / "p").tokens
    assert load_tokenizer(data / "t.model").decode(tokens) == "firstsecondthird"


def test_one_line_for_every_mistake(data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "folder").mkdir()
    good = Job([data / "a.jsonl"], data / "t.model", tmp_path / "p")
    for change, message in (
        ({"inputs": [tmp_path / "none"]}, "none: no such file or folder"),
        ({"inputs": [tmp_path / "folder"]}, "folder: a folder without a file"),
        ({"inputs": [tmp_path / "empty.txt"]}, "nothing to write, the input holds no document with text"),
        ({"tokenizer": tmp_path / "none.model"}, "none.model: no such file"),
        ({"tokenizer": data / "a.jsonl"}, "a.jsonl: not a tokenizer"),
        ({"prefix": tmp_path / "empty.txt" / "p"}, "p.bin.tmp: cannot be written (File exists)"),
        ({"workers": 0}, "--workers 0: at least 1"),
        ({"eod_token": "<eot>"}, "no token '<eot>' in the vocabulary"),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as error:
            preprocess(replace(good, **change))
        assert "\n" not in str(error.value)
    line = fails(
        "preprocess_data", "--input", data / "a.jsonl", "--tokenizer", data / "t.model", "--output-prefix", tmp_path / "p",
        "--text-key", "body", "--workers", 2,
    )  # fmt: skip
    assert "a.jsonl, line 1: no key 'body'; there are text (--text-key)" in line  # raised in a worker
    assert files_of(tmp_path) == ["empty.txt", "folder"]
    done = tool("preprocess_data", "--input", "x")
    assert done.returncode == 2
    assert "required: --tokenizer, --output-prefix" in done.stderr
    assert "--glob '/x': Non-relative" in fails(
        "train_tokenizer", "--input", tmp_path, "--glob", "/x", "--vocab-size", 600, "--output", tmp_path / "t.model"
    )
    line = fails(
        "train_tokenizer", "--input", data / "a.jsonl", "--vocab-size", 90000, "--output", tmp_path / "t.model"
    )
    assert "--vocab-size 90000: Vocabulary size too high" in line


def test_an_existing_pair_is_not_touched(data: Path, tmp_path: Path) -> None:
    args = (
        "--input",
        data / "a.jsonl",
        "--tokenizer",
        data / "t.model",
        "--output-prefix",
        tmp_path / "p",
        "--workers",
        1,
    )
    assert tool("preprocess_data", *args).returncode == 0
    before = (tmp_path / "p.idx").stat().st_mtime_ns
    assert "already there; choose another prefix, or replace with --force" in fails("preprocess_data", *args)
    assert (tmp_path / "p.idx").stat().st_mtime_ns == before
    assert tool("preprocess_data", *args, "--force").returncode == 0
    assert (tmp_path / "p.idx").stat().st_mtime_ns != before


def test_an_input_is_never_replaced(data: Path, tmp_path: Path) -> None:
    (tmp_path / "web.json").write_bytes((data / "a.jsonl").read_bytes())
    before = files_of(tmp_path), (tmp_path / "web.json").read_bytes()
    made = ("--tokenizer", data / "t.model", "--output-prefix", tmp_path / "web", "--force")
    for given in (tmp_path / "web.json", tmp_path):
        assert "web.json: is read as an input too" in fails("preprocess_data", "--input", given, *made)
        options = ("--vocab-size", 600, "--output", tmp_path / "web.json", "--force")
        assert "web.json: is read as an input too" in fails("train_tokenizer", "--input", given, *options)
    assert (files_of(tmp_path), (tmp_path / "web.json").read_bytes()) == before


def test_an_output_has_a_name(data: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("", ".", "..", "folder/", "folder/."):
        for options in (("--tokenizer", data / "t.model", "--output-prefix"), ("--vocab-size", 600, "--output")):
            kind = "preprocess_data" if "--output-prefix" in options else "train_tokenizer"
            done = tool(kind, "--input", data / "a.jsonl", *options, name, cwd=tmp_path)
            assert done.returncode == 2
            assert f"'{name}' ends without a name for the file" in done.stderr
    assert files_of(tmp_path) == ["folder"]


def test_a_full_disk(data: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    line = fails(
        "preprocess_data", "--input", data / "a.jsonl", "--tokenizer", data / "t.model", "--output-prefix", tmp_path / "p",
        "--workers", 2, preexec_fn=limit,
    )  # fmt: skip
    assert "p: writing failed (File too large); nothing was left there" in line
    assert files_of(tmp_path) == []


def start(data: Path, folder: Path, source: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", source, "--tokenizer", data / "t.model",
        "--output-prefix", folder / "p", "--workers", "2", "--split-documents", "line",
    ]  # fmt: skip
    return subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_until_it_writes(process: subprocess.Popen[str], folder: Path) -> None:
    for _ in range(600):
        path = folder / "p.bin.tmp"
        if path.exists() and path.stat().st_size:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    pytest.fail("nothing was written")


def test_killed_and_terminated_runs_leave_no_pair(data: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "endless.txt"
    with pipe.open("wb") as stream:  # large enough to be under way when the signal comes
        stream.write(TEXTS[2].encode() * 2000)
    out = tmp_path / "out"
    out.mkdir()
    process = start(data, out, pipe)
    wait_until_it_writes(process, out)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert set(files_of(out)) <= {"p.bin.tmp", "p.idx.tmp"}
    for _ in range(200):  # the workers end by themselves
        if not any(os.path.exists(f"/proc/{child}") for child in children):
            break
        time.sleep(0.05)
    else:
        pytest.fail("workers outlive a killed tool")
    other = tmp_path / "other"
    other.mkdir()
    process = start(data, other, pipe)
    wait_until_it_writes(process, other)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert files_of(other) == []
    small = tool(
        "preprocess_data", "--input", data / "a.jsonl", "--tokenizer", data / "t.model", "--output-prefix", out / "p"
    )
    assert small.returncode == 0
    assert files_of(out) == ["p.bin", "p.idx", "p.json"]
    assert np.isin(IndexedPair(out / "p").tokens, np.arange(600)).all()
