"""The two steps of launch/quickstart.sh that no tool does: choosing the text, and the table at the end."""

import argparse
import json
import math
import sysconfig
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_zebra.data.indexed import IndexedPair

MOST_BYTES = 12_000_000
HELD_OUT_EVERY = 20
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "ensurepip"}


def corpus(folder: Path) -> None:
    """Write train.jsonl and valid.jsonl: the standard library's sources, sorted, a file a document, every 20th held out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    texts: list[tuple[str, str]] = []
    total = 0
    for path in files:
        data = path.read_bytes()
        if total + len(data) > MOST_BYTES:
            break
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue  # a few sources declare another encoding
        if text.strip():
            texts.append((str(path.relative_to(root)), text))
            total += len(data)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (
        ("train", [t for i, t in enumerate(texts) if i % HELD_OUT_EVERY]),
        ("valid", texts[::HELD_OUT_EVERY]),
    ):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for file, text in part:
                out.write(json.dumps({"file": file, "text": text}) + "\n")
        print(f"{name}: {len(part)} files, {sum(len(t.encode()) for _, t in part) / 1e6:.2f} MB")


def table(folder: Path) -> None:
    """Print what was reached, beside zlib and a unigram model of the tokens on the same held-out files."""
    from megatron_zebra.data.indexed import IndexedPair

    run = folder / "run"
    result = json.loads((run / "evaluation" / "perplexity.json").read_text())["sets"]["valid"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    texts = [json.loads(line)["text"].encode() for line in (folder / "valid.jsonl").read_text().splitlines()]
    size = sum(len(text) for text in texts)
    packed = sum(8 * len(zlib.compress(text, 9)) for text in texts) / size
    unigram = _unigram_bits(IndexedPair(folder / "train"), IndexedPair(folder / "valid")) / size
    seconds = sum(record["step_time"] for record in records)
    print(f"""
  Held-out files ({len(texts)}, {size / 1e6:.2f} MB)
    loss                    {result["loss"]:8.4f} nats a token
    bits per byte           {result["bits_per_byte"]:8.3f} Zebra
                            {packed:8.3f} zlib, level 9, file by file
                            {unigram:8.3f} unigram model of the tokens

  Loss by position in the document""")
    for first, last, loss in zip(result["edges"], result["edges"][1:], result["loss_by_position"]):
        if loss is not None:
            print(f"    {first:6d} .. {last - 1:6d}        {loss:8.4f}  {'#' * round(8 * loss)}")
    print(f"""
  Training
    steps, tokens           {len(records)}, {records[-1]["consumed_tokens"] / 1e6:.2f} M in {seconds:.0f} s
    tokens/s                {records[-1]["consumed_tokens"] / seconds:8.0f}
    peak memory             {max(r["peak_memory_bytes"] for r in records) / 2**20:8.0f} MiB in the main process

  Files
    report, picture         {run / "report.html"}, {run / "plots" / "overview.png"}
    metrics, checkpoints    {run / "metrics.jsonl"}, {run / "checkpoints"}
    tokenizer               {folder / "tokenizer.model"}
""")


def _unigram_bits(train: "IndexedPair", valid: "IndexedPair") -> float:
    """Bits of the held-out tokens under the training tokens' frequencies, with one added to each count."""
    counts = Counter(train.tokens.tolist())
    assert train.info is not None  # tools/preprocess_data.py has just written it
    vocab_size = train.info.vocab_size
    total = len(train.tokens) + vocab_size
    return sum(-math.log2((counts[token] + 1) / total) * n for token, n in Counter(valid.tokens.tolist()).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["corpus", "table"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    {"corpus": corpus, "table": table}[arguments.step](arguments.folder)


if __name__ == "__main__":
    main()
