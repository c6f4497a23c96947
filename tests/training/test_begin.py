"""A run that begins from a Hugging Face folder holds its weights under any layout, and goes on when the folder is gone."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_zebra.convert.kept import KEPT, keep_tokenizer, tokenizer_hashes
from megatron_zebra.convert.source import open_model
from megatron_zebra.convert.to_hf import to_hf
from megatron_zebra.data.batch import read_step
from megatron_zebra.data.indexed import IndexedPair
from megatron_zebra.data.source import other_tokenizer
from megatron_zebra.training.adopt import adopted, notes
from megatron_zebra.training.inputs import open_inputs
from tests.convert.models import again, ids, make, ours, theirs
from tests.training.cases import opened, small
from tests.training.runs import contents, curve, metrics, run
from tests.training.test_loop import pair

QUICK: dict[str, Any] = {
    "training__global_batch_size": 4,
    "training__steps": 1,
    "optimizer__learning_rate": 1e-30,
    "optimizer__warmup_steps": 0,
    "model__window_size": 9,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    make(folder, "Llama", num_hidden_layers=4, vocab_size=101, tie_word_embeddings=True)
    return folder


def settings(load: Path, **more: Any) -> dict[str, Any]:
    return QUICK | {"checkpoint__load": str(load)} | more


LAYOUTS: list[tuple[int, dict[str, int], dict[str, Any]]] = [
    (1, {}, {"optimizer__zero_stage": 0}),
    (2, {"tp": 2}, {"parallel__vocab_multiple": 8}),
    (2, {"pp": 2}, {}),
    (2, {}, {"optimizer__zero_stage": 3}),
    (2, {"cp": 2}, {"optimizer__zero_stage": 2, "training__precision": "bf16"}),
    (2, {}, {"training__lora__rank": 2, "optimizer__zero_stage": 3}),
]


@pytest.mark.parametrize(("world", "axes", "more"), LAYOUTS)
def test_every_layout_holds_the_weights(
    run_distributed: Any, llama: Path, tmp_path: Path, world: int, axes: dict[str, int], more: dict[str, Any]
) -> None:
    more = more | {f"parallel__{name}": size for name, size in axes.items()}
    for seen in run_distributed(run, world, tmp_path, settings(llama, **more), **axes):
        assert seen.error is None
    saved, source = open_model(tmp_path), open_model(llama)
    assert saved.architecture.head_dim == source.architecture.head_dim == 16
    assert saved.names() == source.names()
    for name in source.names():
        want = source.read_tensor(name)
        if more.get("training__precision") == "bf16" or "training__lora__rank" in more:
            torch.testing.assert_close(saved.read_tensor(name), want, rtol=1e-6, atol=1e-30)
        else:
            assert torch.equal(saved.read_tensor(name), want), name
    log = (tmp_path / "logs" / "rank-00000.log").read_text()
    for note in (
        "layers: GlGl, the loaded model has GGGG",
        "window_size: 9, the loaded model has none",
        "max_length: 48, the loaded model has 24",
        f"{llama} has no moments: its weights alone are loaded",
    ):
        assert note in log


def test_the_first_loss_is_the_models(run_distributed: Any, llama: Path, tmp_path: Path) -> None:
    """As a full-attention model, of which transformers' equality is tested elsewhere."""
    full = {"model__layer_group_size": 1, "training__global_batch_size": 1}
    run_distributed(run, 2, tmp_path, settings(llama, **full, parallel__tp=2), tp=2)
    _, inputs = opened(small(**full))
    row = read_step(inputs.train, 0, 0, 1, 1).micro_batches[0]
    edges = row.cu_seqlens.tolist()
    logits = torch.cat([ours(llama, row.tokens[a:b]) for a, b in itertools.pairwise(edges)])
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(float(F.cross_entropy(logits, row.labels)), abs=1e-5)


def test_the_run_goes_on_when_the_model_is_gone(run_distributed: Any, llama: Path, tmp_path: Path) -> None:
    source, whole, halved = tmp_path / "source", tmp_path / "whole", tmp_path / "halved"
    shutil.copytree(llama, source)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (source / name).write_bytes(b"as it is\r\n")
    content = {path.name: path.read_bytes() for path in source.iterdir()}
    more = settings(source, training__steps=4, checkpoint__interval=2, optimizer__learning_rate=1e-3)
    more |= {"model__rope__scaling": "yarn", "model__rope__factor": 2.0}
    run_distributed(run, 1, whole, more)
    run_distributed(run, 1, halved, more, 4)
    shutil.rmtree(source)
    assert notes(adopted(small(**more), halved), halved) == []
    (seen,) = run_distributed(run, 1, halved, more)
    assert seen.error is None
    assert curve(halved) == curve(whole)
    assert contents(halved) == contents(whole)
    rope = open_model(halved).architecture.rope["global"]
    assert (rope.scaling, rope.factor, rope.original_length) == ("yarn", 2.0, 24)
    # And its weights begin another run, whose model is that of the run.
    run_distributed(run, 1, tmp_path / "next", settings(halved, checkpoint__load_part="weights"))
    assert open_model(tmp_path / "next").architecture == open_model(halved).architecture
    for run_dir in (whole, tmp_path / "next"):
        kept = sorted(path.name for path in (run_dir / "huggingface").iterdir())
        assert kept == ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"]
        for name in kept:
            assert (run_dir / "huggingface" / name).read_bytes() == content[name]


def test_adapters_are_merged_in_an_export(run_distributed: Any, llama: Path, tmp_path: Path) -> None:
    more = {"training__lora__rank": 2, "training__lora__alpha": 100.0, "optimizer__learning_rate": 1e-2}
    run_distributed(run, 2, tmp_path / "run", settings(llama, **more, training__steps=3, parallel__tp=2), tp=2)
    to_hf(tmp_path / "run", tmp_path / "out")
    tokens = ids(40, vocabulary=101)
    exported, own = theirs(again(tmp_path / "out"), tokens), ours(tmp_path / "run", tokens)
    torch.testing.assert_close(exported, own, rtol=0, atol=1e-4)
    assert (own - ours(llama, tokens)).abs().max() > 0.01


def test_weights_that_are_not_finite_are_named(run_distributed: Any, tmp_path: Path) -> None:
    model = make(tmp_path / "bad", "Llama", num_hidden_layers=4, vocab_size=101)
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    (seen,) = run_distributed(run, 1, tmp_path / "run", settings(tmp_path / "bad"))
    assert seen.error == f"{tmp_path / 'bad'}: layers.2.mlp.up_proj.weight has values that are not finite"


def test_a_run_keeps_its_own_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(b"pieces")
    (tmp_path / "folder").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "weights.bin"):
        (tmp_path / "folder" / name).write_text(name)
    keep_tokenizer(tmp_path / "a.model", tmp_path / "one")
    keep_tokenizer(tmp_path / "folder", tmp_path / "two")
    keep_tokenizer(tmp_path / "a.model", tmp_path / "two")  # what is there stays
    assert [path.name for path in (tmp_path / "one" / KEPT).iterdir()] == ["tokenizer.model"]
    assert sorted(path.name for path in (tmp_path / "two" / KEPT).iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_data_of_another_tokenizer_than_the_models_is_told(tmp_path: Path) -> None:
    written = pair(tmp_path / "data", 1)  # by a tokenizer whose hash is "abab..."
    run = tmp_path / "run"
    (run / KEPT).mkdir(parents=True)
    data = {"data__synthetic__documents": 0, "data__train": [{"prefix": written}], "checkpoint__load": str(run)}

    def told(**more: Any) -> list[str]:
        return [line for line in open_inputs(small(**data | more)).warnings if "another tokenizer" in line]

    assert not told()  # no tokenizer is there
    (run / KEPT / "tokenizer.model").write_bytes(b"pieces")
    (line,) = told()
    assert line.startswith(
        f"{written}: written with another tokenizer (test.model, 101 tokens) than the one beside the model"
    )
    assert tokenizer_hashes(run / "checkpoints" / "step-00000001") == tokenizer_hashes(run)
    hashes = tokenizer_hashes(run)
    assert other_tokenizer(IndexedPair(written), hashes) == line
    assert other_tokenizer(IndexedPair(written), hashes | {"ab" * 32}) is None
