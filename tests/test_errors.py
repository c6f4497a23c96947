"""What a user is told is one line, whatever it quotes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_zebra.errors import LONGEST, UserError, naming_files, run_tool


def test_what_no_terminal_shows_is_a_question_mark() -> None:
    assert str(UserError("a.json: key 'x\n\x1b[31m\u202e\ud800' é漢")) == "a.json: key 'x??[31m??' é漢"
    assert str(UserError("one\nerror: two")) == "one\nerror: two"


def test_a_line_keeps_its_beginning_and_its_end() -> None:
    text = str(UserError(f"a.json: {'9' * 100_000} is no size"))
    assert text.startswith("a.json: 999")
    assert text.endswith("999 is no size")
    assert len(text) < LONGEST + 10


def test_the_system_s_complaint_about_a_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        Path("x" * 5000).stat()

    with pytest.raises(SystemExit, match="2"):
        run_tool(main)
    assert capsys.readouterr().err == f"error: {'x' * 200}: File name too long\n"
    with pytest.raises(BrokenPipeError), naming_files():
        raise BrokenPipeError  # about no file


def test_output_that_was_closed_before_the_start_is_no_fault() -> None:
    program = "from megatron_zebra.errors import run_tool; run_tool(lambda: print('x'))"
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" >&-', sys.executable, program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("letters", [1, 10**6], ids=["at the end", "before it"])
def test_output_to_a_full_disk_is_one_line(letters: int) -> None:
    program = f"from megatron_zebra.errors import run_tool; run_tool(lambda: print('x' * {letters}))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device: the output needs room where it is written\n"


def test_letters_that_the_output_lacks_are_no_failure() -> None:
    program = "from megatron_zebra.errors import run_tool; run_tool(lambda: print('a漢'))"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a?\n", "")


def test_output_that_nobody_reads_ends_a_tool_as_sigpipe_does() -> None:
    program = "from megatron_zebra.errors import run_tool; run_tool(lambda: print('x' * 10**6, '\\n'))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
