"""tools/evaluate.py logits: those of transformers, in any shape of ids and however they are cut; one line for bad ids."""

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from megatron_zebra.inference import language_model
from tests.convert.models import make
from tests.tools.test_evaluate import tool


@pytest.mark.parametrize("shape", [(50,), (3, 21)])
def test_logits_are_those_of_transformers(tmp_path: Path, shape: tuple[int, ...]) -> None:
    theirs = make(tmp_path / "hf", "Cwm", sliding_window=8)
    ids = np.random.default_rng(1).integers(0, 61, shape).astype(np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    words = ["--checkpoint", str(tmp_path / "hf"), "--ids", str(tmp_path / "ids.npy"), "--device", "cpu"]
    real = language_model.LanguageModel.logit_chunks

    def chunks(self: language_model.LanguageModel, row: torch.Tensor) -> Iterator[torch.Tensor]:
        """Small ones, laid out in memory as tensor parallelism gathers them."""
        return (chunk.t().contiguous().t() for chunk in real(self, row, 16))

    with patch.object(language_model.LanguageModel, "logit_chunks", chunks):
        assert tool("logits", *words, "--output", str(tmp_path / "out" / "l.npy")) == 0
    found = np.load(tmp_path / "out" / "l.npy")
    assert found.dtype == np.float32
    assert found.shape == (*shape, 61)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids.astype(np.int64)).reshape(-1, shape[-1])).logits
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted.numpy(), atol=1e-4)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["l.npy"]


def test_bad_ids_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "hf", "Llama")
    capsys.readouterr()
    bad = {
        "high": (np.array([3, 61]), "token 61 is outside the vocabulary 0 .. 60"),
        "low": (np.array([[3], [-1]]), "token -1 is outside the vocabulary 0 .. 60"),
        "real": (np.array([0.5]), "holds float64 [1]; must be whole numbers [T] or [batch, T]"),
        "deep": (np.zeros((1, 1, 1), int), "holds int64 [1, 1, 1]; must be"),
        "none": (np.zeros((2, 0), int), "at least one"),
    }
    for name, (ids, _) in bad.items():
        np.save(tmp_path / f"{name}.npy", ids)
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.npy").write_text("")
    told = {name: part for name, (_, part) in bad.items()}
    told |= {"text": "is no .npy file", "empty": "is no .npy file", "missing": "No such file"}
    for name, part in told.items():
        words = ["--checkpoint", str(tmp_path / "hf"), "--ids", str(tmp_path / f"{name}.npy"), "--device", "cpu"]
        assert tool("logits", *words, "--output", str(tmp_path / "l.npy")) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"error: --ids {tmp_path / name}.npy: ")
        assert err.count("\n") == 1
        assert part in err
    assert not list(tmp_path.glob("l.npy*"))
    np.save(tmp_path / "ids.npy", np.array([1]))
    same = ["--ids", str(tmp_path / "ids.npy"), "--output", f"{tmp_path}/../{tmp_path.name}/ids.npy"]
    assert tool("logits", "--checkpoint", str(tmp_path / "hf"), *same, "--device", "cpu") == 2
    assert "is the file of --ids; give another" in capsys.readouterr().err
    assert np.load(tmp_path / "ids.npy").tolist() == [1]
