"""Perplexity is that of transformers, whole and sliding; by document; and one number whatever ranks divide the work."""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_zebra.convert.source import open_model
from megatron_zebra.data.indexed import IndexedPair
from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.load import load_subject
from megatron_zebra.evaluation.tasks import perplexity
from megatron_zebra.parallel.grid import Grid
from tests.convert.models import make
from tests.training.test_loop import pair

VOCAB = 101


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/, a model of transformers with windows of 8 keys, and a pair of ragged documents."""
    folder = tmp_path_factory.mktemp("perplexity")
    shape = {"vocab_size": VOCAB, "num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}
    make(folder / "hf", "Cwm", sliding_window=8, **shape)
    pair(folder / "data", 1, 12)
    return folder


def options(folder: Path, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    perplexity.options(parser)
    return parser.parse_args(["--data", str(folder / "data"), *words], argparse.Namespace(tp=1, cp=1))


def measured(grid: Grid, folder: Path, words: list[str]) -> dict[str, Any]:
    subject = load_subject(open_model(folder / "hf"), grid, torch.float32)
    return perplexity.measure(subject, options(folder, *words))


def documents(folder: Path) -> Iterator[torch.Tensor]:
    data = IndexedPair(folder / "data")
    starts = [data.document_start(number) for number in range(data.documents)]
    for start, stop in itertools.pairwise([*starts, data.tokens.size]):
        yield torch.from_numpy(data.tokens[start:stop].astype(np.int64))


def sliding(theirs: Any, ids: torch.Tensor, max_length: int, stride: int) -> tuple[float, int]:
    """The loop of transformers' documentation on perplexity: sum of losses and targets of one text."""
    total, targets, seen = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        labels = ids[begin:end].clone()
        labels[: len(labels) - (end - seen)] = -100
        counted = int((labels[1:] != -100).sum())
        if counted:
            with torch.no_grad():
                total += float(theirs(ids[None, begin:end], labels=labels[None]).loss) * counted
        targets, seen = targets + counted, end
        if end == len(ids):
            break
    return total, targets


@pytest.mark.parametrize(("length", "stride"), [(16, 5), (16, 1), (8, 8), (64, 16)])
def test_sliding_windows_are_those_of_transformers(
    run_distributed: Any, folder: Path, length: int, stride: int
) -> None:
    """Their windows of S + 1 tokens have S of them as inputs."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, attn_implementation="eager")
    words = ["--sequence-length", str(length), "--stride", str(stride), "--by-document"]
    (result,) = run_distributed(measured, 1, folder, words)
    found = result["sets"]["data"]
    texts = list(documents(folder))
    assert max(map(len, texts)) > 3 * length or length == 64
    wanted = [sliding(theirs, ids, length + 1, stride) for ids in texts]
    assert found["targets"] == sum(targets for _, targets in wanted) == sum(len(ids) - 1 for ids in texts)
    assert found["loss"] == pytest.approx(sum(total for total, _ in wanted) / found["targets"], abs=1e-5)
    for one in found["documents"]:
        total, targets = wanted[one["document"]]
        assert one["targets"] == targets
        assert one["loss"] == pytest.approx(total / targets, abs=1e-5)
    assert len(found["documents"]) == sum(len(ids) > 1 for ids in texts)
    losses = [one["loss"] for one in found["documents"]]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("axes", [{"tp": 2}, {"cp": 2}, {"pp": 2}, {"cp": 2, "tp": 2}, {}])
@pytest.mark.parametrize("stride", [[], ["--stride", "8"]])
def test_ranks_that_divide_the_work_find_the_same(
    run_distributed: Any, folder: Path, axes: dict[str, int], stride: list[str]
) -> None:
    words = ["--sequence-length", "16", "32", "--by-document", *stride]
    (alone,) = run_distributed(measured, 1, folder, words)
    assert list(alone["sets"]) == ["data at 16", "data at 32"]
    ranks = max(2, int(np.prod(list(axes.values()))))
    for result in run_distributed(measured, ranks, folder, words, **axes):
        for name, wanted in alone["sets"].items():
            found = result["sets"][name]
            assert found["targets"] == wanted["targets"]
            assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
            assert found["loss_by_position"] == pytest.approx(wanted["loss_by_position"], abs=1e-4)
            by_number = {one["document"]: one for one in found["documents"]}
            for one in wanted["documents"]:
                assert by_number[one["document"]]["loss"] == pytest.approx(one["loss"], abs=1e-4)
                assert by_number[one["document"]]["targets"] == one["targets"]


def test_options_that_cannot_be_are_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^--stride 9: must not be above --sequence-length 8$"):
        perplexity.check(options(folder, "--sequence-length", "16", "8", "--stride", "9"))
    divided = options(folder, "--sequence-length", "30")
    divided.cp = 2
    with pytest.raises(UserError, match=r"^--sequence-length 30: must be a multiple of 4 .* \(nearest: 28 or 32\)$"):
        perplexity.check(divided)


def test_numbers_and_words(run_distributed: Any, folder: Path) -> None:
    (result,) = run_distributed(measured, 1, folder, ["--sequence-length", "64", "--by-document"])
    found = result["sets"]["data"]
    assert perplexity.numbers(result) == {"data/loss": found["loss"]}
    lines = perplexity.told(result).splitlines()
    assert len(lines) == 12
    worst, best = found["documents"][0], found["documents"][-1]
    assert lines[1] == f"  document {worst['document']:>8}: loss {worst['loss']:.4f}, {worst['targets']} targets"
    assert lines[6] == "  ..."
    assert lines[11].startswith(f"  document {best['document']:>8}: ")
