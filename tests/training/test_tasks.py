"""Tasks of tools/evaluate.py in the middle of training: what the tool says of that checkpoint, in files and in metrics."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_zebra.config import check
from megatron_zebra.errors import UserError
from megatron_zebra.training.tasks import rehearse
from tests.data.chatting import chat_tokenizer, messages, write_lines
from tests.data.test_indexed import write
from tests.tools.test_evaluate import tool
from tests.training.cases import opened, small
from tests.training.runs import curve, metrics, run
from tests.training.test_loop import QUICK, pair

STEPS = QUICK | {"model__vocab_size": 300, "training__steps": 3, "checkpoint__interval": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    pair(folder / "held", 1, 10)
    chat_tokenizer(folder / "tokenizer")
    write_lines(folder / "qa.jsonl", *({"messages": messages(f"What is {n}?", "red")} for n in range(5)))
    (folder / "lines.jsonl").write_text(json.dumps({"text": "the red fox said"}) + "\n")
    (folder / "fox.yaml").write_text(
        "task: fox\noutput_type: loglikelihood_rolling\ndataset_path: json\ntest_split: train\n"
        f"dataset_kwargs: {{data_files: {folder}/lines.jsonl}}\ndoc_to_text: ''\ndoc_to_target: '{{{{text}}}}'\n"
        "metric_list: [{metric: byte_perplexity}]\n"
    )
    return folder


def tasks(folder: Path) -> list[dict[str, Any]]:
    rows = {"data": [str(folder / "held")], "sequence_length": [16, 32], "stride": 8}
    found = {"text": str(folder / "lines.jsonl"), "lengths": 200, "depths": 2, "examples": 1, "repeat": True}
    fox = {"tasks": "fox", "include_path": str(folder)}
    return [
        {"task": "perplexity", "interval": 2, "options": rows},
        {"task": "answers", "name": "qa", "interval": 2, "options": {"data": str(folder / "qa.jsonl")}},
        {"task": "retrieval", "interval": 3, "options": found | {"tasks": ["passkey"]}},
        {"task": "harness", "interval": 3, "options": fox},
    ]


def said_by_the_tool(folder: Path, step: Path, task: dict[str, Any], output: Path) -> dict[str, Any]:
    options = task["options"] | ({"tokenizer": str(folder / "tokenizer")} if task["task"] != "perplexity" else {})
    words = [task["task"], "--checkpoint", str(step), "--device", "cpu", "--output", str(output)]
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    assert tool(*words) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    ("ranks", "axes", "stage"), [(1, {}, 2), (2, {}, 1), (2, {"tp": 2}, 1), (2, {"cp": 2}, 1)], ids=str
)
def test_results_are_those_of_the_tool(
    run_distributed: Any, folder: Path, tmp_path: Path, ranks: int, axes: dict[str, int], stage: int
) -> None:
    settings = STEPS | {f"parallel__{axis}": size for axis, size in axes.items()} | {"optimizer__zero_stage": stage}
    with_tasks = {"evaluation__tasks": tasks(folder), "data__tokenizer": str(folder / "tokenizer")}
    for seen in run_distributed(run, ranks, tmp_path / "run", settings | with_tasks, **axes):
        assert seen.error is None
    records = metrics(tmp_path / "run")
    files = {file.name: json.loads(file.read_text()) for file in (tmp_path / "run" / "evaluation").iterdir()}
    assert sorted(files) == [
        "harness-step-00000003.json",
        "perplexity-step-00000002.json",
        "perplexity-step-00000003.json",
        "qa-step-00000002.json",
        "qa-step-00000003.json",
        "retrieval-step-00000003.json",
    ]
    assert not any("/" in name and "held" in name for name in records[0])
    for step, numbers in ((2, (0, 1)), (3, (0, 1, 2, 3))):
        checkpoint = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        for number in numbers:
            task = tasks(folder)[number]
            found = files[f"{task.get('name', task['task'])}-step-{step:08d}.json"]
            wanted = said_by_the_tool(folder, checkpoint, task, tmp_path / "said.json")
            if number == 0:
                for name, losses in wanted["sets"].items():
                    assert found["sets"][name]["loss"] == pytest.approx(losses["loss"], abs=1e-5)
                    assert records[step - 1][f"perplexity/{name}/loss"] == found["sets"][name]["loss"]
            elif number == 1:
                assert found["all"] == pytest.approx(wanted["all"], abs=1e-5)
                assert records[step - 1]["qa/exact"] == found["all"]["exact"]
            elif number == 2:
                assert found["tasks"]["passkey"]["all"] == pytest.approx(wanted["tasks"]["passkey"]["all"], abs=1e-5)
                assert records[step - 1]["retrieval/passkey/exact/200"] == found["tasks"]["passkey"]["all"]["exact"]
            else:
                value = found["tasks"]["fox"]["byte_perplexity,none"]
                assert value == pytest.approx(wanted["tasks"]["fox"]["byte_perplexity,none"], rel=1e-5)
                assert records[step - 1]["harness/fox/byte_perplexity"] == value
    if ranks == 2 and not axes:
        # Judging takes nothing from training.
        run_distributed(run, ranks, tmp_path / "without", settings, **axes)
        assert curve(tmp_path / "without") == curve(tmp_path / "run")


def test_perplexity_through_a_pipeline(run_distributed: Any, folder: Path, tmp_path: Path) -> None:
    settings = STEPS | {"parallel__pp": 2, "evaluation__tasks": tasks(folder)[:1]}
    for seen in run_distributed(run, 2, tmp_path / "run", settings, pp=2):
        assert seen.error is None
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    wanted = said_by_the_tool(folder, checkpoint, tasks(folder)[0], tmp_path / "said.json")
    for name, losses in wanted["sets"].items():
        assert metrics(tmp_path / "run")[-1][f"perplexity/{name}/loss"] == pytest.approx(losses["loss"], abs=1e-5)


def test_a_plan_that_cannot_be_is_one_line(folder: Path) -> None:
    good = tasks(folder)
    for change, part in (
        ({"options": {"date": "x"}}, "evaluation.tasks[0].options: the following arguments are required: --data"),
        (
            {"options": good[0]["options"] | {"strid": 3}},
            "evaluation.tasks[0].options: unrecognized arguments: --strid 3",
        ),
        ({"options": {"data": str(folder / "no")}}, "evaluation.tasks[0].options: "),
        ({"options": good[0]["options"] | {"stride": 0}}, "--stride: must be a whole number from 1 on, not 0"),
        (good[1], "evaluation.tasks[0].options: the following arguments are required: --tokenizer"),
        (good[2], "evaluation.tasks[0].options: --tokenizer: must be given, since data.tokenizer is not"),
    ):
        with pytest.raises(UserError) as raised:
            opened(small(**STEPS, evaluation__tasks=[good[0] | change]))
        assert str(raised.value).startswith("evaluation.tasks[0].options: ")
        assert part in str(raised.value)
        assert "\n" not in str(raised.value)


def test_what_a_task_would_not_find_is_told_before_the_run_starts(folder: Path, tmp_path: Path) -> None:
    """Else it would be told at the first evaluation, hours later and before anything is saved."""
    tokenizer = {"tokenizer": str(folder / "tokenizer")}
    held, qa, found, fox = (task | {"options": task["options"] | tokenizer} for task in tasks(folder))
    held["options"].pop("tokenizer")
    write(tmp_path / "other", [[1, 700]], 1000)
    write_lines(tmp_path / "bad.jsonl", {"messages": messages("What is 1?", "red")}, {"text": "no conversation"})
    for task, change, part in (
        (
            held,
            {"data": str(tmp_path / "other")},
            "other: holds id 700 (tokenizer test.model, 1000 tokens), but model.vocab",
        ),
        (qa, {"data": str(tmp_path / "bad.jsonl")}, "bad.jsonl, line 2: no key 'messages' or 'conversations'"),
        (found, {"text": str(folder / "no")}, "--text " + str(folder / "no") + ": no such file"),
        (found, {"lengths": 20}, "--lengths 20: too short for the task passkey"),
        (found, {"repeat": False, "lengths": 4000}, "--text: has "),
        (found, {"chat": True, "chat_template": str(folder / "no")}, "--chat-template " + str(folder / "no")),
        (fox, {"tasks": "wolf"}, "--tasks wolf: no such task in lm-eval or in "),
    ):
        task = task | {"options": task["options"] | change}
        with pytest.raises(UserError) as raised:
            rehearse(opened(small(**STEPS, evaluation__tasks=[held, task | {"name": "wrong"}]))[1].tasks, 300)
        assert str(raised.value).startswith("evaluation.tasks[1].options: "), part
        assert part in str(raised.value)
    for task in (found, fox):
        planned = opened(small(**STEPS, evaluation__tasks=[task]))[1].tasks
        rehearse(planned, 300)
        with pytest.raises(UserError, match=r"tasks\[0\].options: --tokenizer .*: has 300 tokens, the model 299"):
            rehearse(planned, 299)


def test_layouts_that_leave_no_rank_all_layers_are_refused(folder: Path) -> None:
    for more, ranks, said in (
        ({"parallel__pp": 2}, 2, "parallel.pp = 2 does not leave (allowed: perplexity; or parallel.pp up to 1)"),
        ({"optimizer__zero_stage": 3}, 1, "optimizer.zero_stage = 3 does not leave"),
    ):
        found = check.problems(small(**STEPS, **more, evaluation__tasks=tasks(folder)), ranks)
        assert [line.split(":")[0] for line in found] == [
            f"evaluation.tasks[{n}].task = {task}" for n, task in ((1, "answers"), (2, "retrieval"), (3, "harness"))
        ]
        assert all(said in line for line in found)
    same = [tasks(folder)[0]] * 2
    (line,) = check.problems(small(**STEPS, evaluation__tasks=same), 1)
    for name in ("valid", "loss", "communication_bytes"):
        (taken,) = check.problems(small(**STEPS, evaluation__tasks=[same[0] | {"name": name}]), 1)
        assert taken.startswith(
            f"evaluation.tasks[0].name = {name}: training's own metrics begin so (valid, loss, comm"
        )
    assert line.startswith("evaluation.tasks[1].name = null: another task is named 'perplexity' too")
