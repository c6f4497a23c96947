"""Commands in README and docs are ones that can be given: each is read by its own parser and has a twin that CI runs.

A ```bash block holds commands. A line that ends with ``# not run ...`` (why or where) is left alone; so is a block
```bash not-run. A block ```bash run is run as it stands. Of every other command the program must be in ``TWINS``, its options
are read by the program's parser, and its configuration is checked with all keys and values.
"""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import pretrain_zebra
from megatron_zebra.config import check
from megatron_zebra.config.load import load_config, parse_words
from tests.docs.pages import PAGES, ROOT, Block, blocks

# A command's program, and its task where it has several -> the test that runs such a command on something tiny.
TWINS = {
    "pretrain_zebra.py": "tests/docs/test_chain.py::test_from_text_to_an_exported_model",
    "train_tokenizer.py": "tests/docs/test_chain.py::test_from_text_to_an_exported_model",
    "preprocess_data.py": "tests/docs/test_chain.py::test_from_text_to_an_exported_model",
    "preprocess_data.py --chat": "tests/data/test_chat.py::test_the_tool_writes_a_mask_beside_the_tokens",
    "build_long_qa.py": "tests/data/test_qa.py::test_the_seed_decides_and_not_the_workers",
    "convert_checkpoint.py from-hf": "tests/convert/test_tool.py::test_there_and_back_and_verified",
    "convert_checkpoint.py to-hf": "tests/convert/test_tool.py::test_there_and_back_and_verified",
    "convert_checkpoint.py verify": "tests/convert/test_tool.py::test_there_and_back_and_verified",
    "convert_checkpoint.py inspect": "tests/convert/test_tool.py::test_there_and_back_and_verified",
    "evaluate.py perplexity": "tests/tools/test_evaluate.py::test_perplexity_is_that_of_the_validation",
    "evaluate.py answers": "tests/tools/test_evaluate_answers.py::test_a_table_a_file_and_a_picture",
    "evaluate.py retrieval": "tests/tools/test_evaluate_retrieval.py::test_tables_a_file_and_a_picture",
    "evaluate.py harness": "tests/evaluation/test_harness.py::test_the_tool_writes_the_scores",
    "evaluate.py compare": "tests/tools/test_evaluate_compare.py::test_every_number_in_its_place",
    "evaluate.py logits": "tests/tools/test_evaluate_logits.py::test_logits_are_those_of_transformers",
    "generate.py": "tests/docs/test_chain.py::test_from_text_to_an_exported_model",
    "plan.py": "tests/tools/test_plan.py::test_a_layout_by_length_and_its_picture",
    "profile_attention.py": "tests/tools/test_profile_attention.py::test_layers_are_measured_and_drawn",
    "report.py": "tests/docs/test_chain.py::test_from_text_to_an_exported_model",
    "torchrun.sh": "tests/launching/test_launchers.py::test_stopped_under_torchrun_and_ended_under_deepspeed",
    "train.sh": "tests/launching/test_launchers.py::test_stopped_under_torchrun_and_ended_under_deepspeed",
    "rehearsal.py": "tests/launching/test_rehearsal.py::test_a_node_is_lost_and_returns",
    # Minutes; its steps are the commands above.
    "quickstart.sh": "tests/docs/test_chain.py::test_from_text_to_an_exported_model",
    "run.sh": "tests/docs/test_commands.py::test_each_program_has_a_twin",  # CI itself
}
TORCHRUN = {"--nproc-per-node", "--nnodes", "--node-rank", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}


@dataclass(frozen=True)
class Command:
    """A command of a page: ``program`` is a file of the checkout, ``words`` what follows, ``ranks`` how many processes."""

    page: str
    line: str
    program: str
    words: tuple[str, ...]
    ranks: int | None

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"

    @property
    def kind(self) -> str:
        name = Path(self.program).name
        if name in ("evaluate.py", "convert_checkpoint.py"):
            return f"{name} {self.words[0]}"
        return f"{name} --chat" if name == "preprocess_data.py" and "--chat" in self.words else name


def lines(block: Block) -> list[str]:
    """Its commands: continued lines joined; comments, loops' own words and what is not run left out."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if not re.search(r"# not run\b", line):
            found += [part.strip() for part in re.split(r" && ", line)]
    return [line for line in found if line and not line.startswith(("#", "for ")) and line != "done"]


def command(page: str, line: str) -> Command | None:
    """``line`` as a command of this project; None for one that makes a folder or installs it."""
    words = shlex.split(re.sub(r"\$\{?\w+\}?", "4", line), comments=True)
    while re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    ranks = None
    if words[0] == "mkdir":
        return None
    sourced = words[:2] == ["source", "launch/environment.sh"]
    if sourced or words[:3] == ["pip", "install", "-c"] or words[:3] == ["pip", "install", "-e"]:
        extras = re.search(r"environment\.sh (\S+)" if sourced else r"\.\[(.+)\]", line)
        project = (ROOT / "pyproject.toml").read_text()
        assert extras is None or all(
            re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras[1].split(",")
        )
        return None
    if words[0] == "torchrun":
        place = next(number for number, word in enumerate(words) if word.endswith(".py"))
        options = dict(zip(words[1:place:2], words[2:place:2]))
        assert set(options) <= TORCHRUN, line
        ranks = int(options["--nproc-per-node"]) * int(options.get("--nnodes", 1))
        words = words[place - 1 :]
    assert words[0] in ("python", "bash") or ranks, f"{page}: {line}: mark it with '# not run', or give it a twin"
    if processes := re.search(r"\.sh .*--nproc-per-node (\d+)", line):
        nodes = re.search(r"--nnodes (\d+)", line)
        ranks = int(processes[1]) * (int(nodes[1]) if nodes else 1)
    return Command(page, line, words[1], tuple(words[2:]), ranks)


COMMANDS = [
    found
    for page in PAGES
    for kind in ("bash", "bash run")
    for block in blocks(page, kind)
    for line in lines(block)
    if (found := command(block.page, line)) is not None
]


def my_yaml(page: str) -> dict[str, object]:
    """The my.yaml that ``page`` shows, or else the README's."""
    for place in (ROOT / page, ROOT / "README.md"):
        for block in blocks(place, "yaml"):
            if block.text.startswith("# my.yaml"):
                found: dict[str, object] = yaml.safe_load(block.text)
                return found
    raise AssertionError("no my.yaml")


def check_configuration(given: Command, words: list[str], folder: Path) -> None:
    """The configuration of a command that trains or plans: every key and value, and the rules between them."""
    line = parse_words(words)
    file = line.config
    if file == "my.yaml":
        file = str(folder / "my.yaml")
        Path(file).write_text(yaml.dump(my_yaml(given.page)))
    config = load_config(file, line.overrides)
    ranks = given.ranks or line.world_size or 1
    wrong = check.problems(config, ranks) if "--search" not in given.words else []
    # The model's sizes may be those of checkpoint.load, which is not here.
    assert not [text for text in wrong if config.checkpoint.load is None or not text.startswith("parallel.tp")], wrong


@pytest.mark.parametrize("given", COMMANDS, ids=str)
def test_a_command_is_read_by_its_program(given: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert (ROOT / given.program).is_file()
    if given.program.endswith(".sh"):
        subprocess.run(["bash", "-n", given.program], check=True)
        # A launcher's own options stand before --config.
        words = list(given.words)
        if "--config" in words:
            check_configuration(given, words[words.index("--config") :], tmp_path)
        elif given.kind == "quickstart.sh":
            parse_words(words)
    elif given.program == "pretrain_zebra.py":
        check_configuration(given, list(given.words), tmp_path)
    else:
        module = importlib.import_module(given.program.removesuffix(".py").replace("/", "."))
        monkeypatch.setattr(sys, "argv", [given.program, *given.words])
        if given.program == "tools/plan.py":
            arguments, rest = module.parser().parse_known_args()
            ranked = Command(given.page, given.line, given.program, given.words, arguments.gpus)
            check_configuration(ranked, ["--config", arguments.config, *rest], tmp_path)
        elif hasattr(module, "parser"):
            module.parser().parse_args()
        else:
            module.parse()


@pytest.mark.parametrize("kind", sorted({given.kind for given in COMMANDS}))
def test_each_program_has_a_twin(kind: str) -> None:
    file, name = TWINS[kind].split("::")
    functions = [
        node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)
    ]
    assert name in functions


@pytest.mark.parametrize(
    "block", [block for page in PAGES for block in blocks(page, "bash run")], ids=lambda block: block.page
)
def test_blocks_that_are_run_as_they_stand(block: Block, tmp_path: Path) -> None:
    for name in ("tools", "docs", "launch", "pretrain_zebra.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for line in lines(block):
        words = shlex.split(line, comments=True)
        program = sys.executable if words[0] == "python" else words[0]
        subprocess.run([program, *words[1:]], cwd=tmp_path, check=True, capture_output=True)


ANSWERS = [
    pytest.param(words, answer, id=words)
    for page in PAGES
    for block in blocks(page, "")
    for words, answer in re.findall(r"^\$ python pretrain_zebra.py (.*)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE)
]


@pytest.mark.parametrize(("words", "answer"), ANSWERS)
def test_answers_are_as_shown(
    words: str, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    pretrain_zebra.main(shlex.split(words))
    assert "".join(capsys.readouterr()) == answer


def test_there_are_many() -> None:
    assert len(ANSWERS) >= 2
    assert len(COMMANDS) >= 80
    assert [block for page in PAGES for block in blocks(page, "bash run")]
