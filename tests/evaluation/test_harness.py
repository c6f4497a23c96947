"""Tasks of lm-eval give our model the scores that they give the same model in transformers, on any ranks."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_zebra.convert.source import open_model
from megatron_zebra.data.tokenizer import load_tokenizer
from megatron_zebra.evaluation.load import load_subject
from megatron_zebra.evaluation.tasks import harness
from megatron_zebra.inference.language_model import LanguageModel
from megatron_zebra.parallel.grid import Grid
from tests.convert.models import make
from tests.data.chatting import chat_tokenizer, with_bos
from tests.tools.test_evaluate import tool

TASKS = ["choice", "continuation", "text", "generation"]
WORDS = ["the", "red", "fox", "said", "what", "is", "code", "to", "a", "user", "of", "it"]
LENGTH = 60


def sentence(generator: np.random.Generator, words: int) -> str:
    return " ".join(generator.choice(WORDS, words))


def write_tasks(folder: Path) -> None:
    """A task of each kind of request, with its questions beside it."""
    generator = np.random.default_rng(0)
    lines = [
        {
            "text": sentence(generator, 3 + number),
            "choices": [" " + sentence(generator, 1 + number % 3) for _ in range(3)],
            "right": number % 3,
        }
        for number in range(11)
    ]
    lines[3]["text"] = ""
    lines[5]["text"] = sentence(generator, 3 * LENGTH)  # longer than the model takes
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(folder / "lines.jsonl")},
        "test_split": "train",
        "fewshot_split": "train",
        "doc_to_text": "{{text}}",
    }
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    kinds: dict[str, dict[str, Any]] = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "right",
            "target_delimiter": "",
            "metric_list": [accuracy, accuracy | {"metric": "acc_norm"}],
        },
        "continuation": {
            "output_type": "loglikelihood",
            "doc_to_target": "{{choices[right]}}",
            "target_delimiter": "",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                accuracy,
            ],
        },
        "text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text ~ ' end'}}",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
        },
        "generation": {
            "output_type": "generate_until",
            "doc_to_target": "{{right}}",
            "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    kinds["broken"] = kinds["text"] | {"dataset_kwargs": {"data_files": "/no/such/file"}}
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | kind))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plain/, a model of transformers with its tokenizer; bos/, whose tokenizer puts a token before each text; tasks/."""
    folder = tmp_path_factory.mktemp("harness")
    shape = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": LENGTH}
    for name in ("plain", "bos"):
        make(folder / name, "Cwm", sliding_window=8, **shape)
        chat_tokenizer(folder / name)
    with_bos(folder / "bos")
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    return folder


def options(folder: Path, model: str, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    harness.options(parser)
    given = ["--tasks", *TASKS, "--include-path", str(folder / "tasks"), "--tokenizer", str(folder / model), *words]
    return parser.parse_args(given)


def measured(grid: Grid, folder: Path, model: str, words: list[str]) -> dict[str, Any]:
    subject = load_subject(open_model(folder / model), grid, torch.float32)
    return harness.measure(subject, options(folder, model, *words), [2], 1)


def generated(grid: Grid, folder: Path, asked: list[tuple[str, dict[str, Any]]]) -> list[str]:
    from lm_eval.api.instance import Instance

    from megatron_zebra.evaluation.harness import HarnessModel

    subject = load_subject(open_model(folder / "bos"), grid, torch.float32)
    assert subject.decoder is not None
    model = LanguageModel(subject.arch, subject.decoder, grid.tp)
    ours = HarnessModel(model, load_tokenizer(folder / "bos"), grid.data, [2], 1, LENGTH, 3)
    return ours.generate_until([Instance("generate_until", {}, one, 0) for one in asked])


def harness_of_transformers(folder: Path, model: str) -> Any:
    """lm-eval's own class for transformers."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / model)
    tokenizer.pad_token = "<|endoftext|>"
    return HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=3, max_length=LENGTH, device="cpu")


@pytest.mark.parametrize(("model", "shots"), [("plain", 0), ("bos", 2)])
def test_scores_are_those_of_transformers(run_distributed: Any, folder: Path, model: str, shots: int) -> None:
    (ours,) = run_distributed(measured, 1, folder, model, ["--num-fewshot", str(shots), "--batch-size", "4"])
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    asked: Any = harness_of_transformers(folder, model)
    wanted: Any = simple_evaluate(asked, tasks=TASKS, task_manager=manager, num_fewshot=shots, bootstrap_iters=0)
    for name in TASKS:
        metrics = {key: value for key, value in wanted["results"][name].items() if isinstance(value, int | float)}
        assert len(metrics) > 1
        assert ours["tasks"][name] == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert 0 < ours["tasks"]["choice"]["acc,none"] < 1


def test_generated_texts_are_those_of_transformers(run_distributed: Any, folder: Path) -> None:
    """Unequal prompts, longer ones than fit, several lengths and stops; some texts end by a stop, and some by length."""
    from lm_eval.api.instance import Instance

    generator = np.random.default_rng(5)
    asked = [
        (sentence(generator, 1 + 4 * number), {"until": stops, "max_gen_toks": 6 + number % 2 * 20, "do_sample": False})
        for number in range(14)
        for stops in ([["e", "X"], []][number % 2],)
    ]
    wanted = harness_of_transformers(folder, "bos").generate_until(
        [Instance("generate_until", {}, one, 0) for one in asked]
    )
    assert len(set(wanted)) > 5
    for ranks, axes in ((1, {}), (2, {}), (2, {"tp": 2})):
        for found in run_distributed(generated, ranks, folder, asked, **axes):
            assert found == wanted


def test_ranks_that_share_the_questions_find_the_same(run_distributed: Any, folder: Path) -> None:
    (alone,) = run_distributed(measured, 1, folder, "bos", [])
    for axes in ({}, {"tp": 2}):
        for found in run_distributed(measured, 2, folder, "bos", [], **axes):
            for name in TASKS:
                assert found["tasks"][name] == pytest.approx(alone["tasks"][name], rel=1e-5)


def test_the_tool_writes_the_scores(
    run_distributed: Any,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--checkpoint", str(folder / "bos"), "--device", "cpu", "--include-path", str(folder / "tasks")]
    output = ["--output", str(tmp_path / "h.json")]
    assert tool("harness", *words, "--tasks", "choice", "text", "--limit", "4", *output) == 0
    out = capsys.readouterr().out
    (wanted,) = run_distributed(measured, 1, folder, "bos", ["--limit", "4"])
    said = json.loads((tmp_path / "h.json").read_text())
    assert said["tasks"]["text"] == pytest.approx(wanted["tasks"]["text"])
    assert said["tasks"]["choice"]["sample_len"] == 4
    found = harness.numbers(said)
    assert sorted(found) == ["choice/acc", "choice/acc_norm", "text/bits_per_byte", "text/byte_perplexity"]
    assert f"byte_perplexity      {found['text/byte_perplexity']:.4f}" in out
    from lm_eval import tasks

    real = tasks.TaskManager
    # Reading the index of lm-eval's own tasks takes many seconds.
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path, include_defaults: real(None, include_path, False))
    for more, part in (
        (["--tasks", "choice", "nothing"], "--tasks nothing: no such task in lm-eval or in "),
        (["--tasks", "choice", "--include-path", str(tmp_path / "no")], "no: no such folder"),
        (["--tasks", "broken"], "--tasks broken: cannot be loaded: "),
        (["--tasks", "generation", "--max-length", "9"], "a task generates 12 tokens, which leaves no room"),
        (["--tasks", "choice", "--num-fewshot", "-1"], "--num-fewshot -1: must not be negative"),
    ):
        assert tool("harness", *words, *more, *output) == 2
        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith("error: ")
        assert part in err.splitlines()[-1]
