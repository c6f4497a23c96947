"""Tokenizers of both kinds, and the training of one."""

import io
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from megatron_zebra.data import train_tokenizer as training
from megatron_zebra.data.inputs import InputOptions
from megatron_zebra.data.tokenizer import Tokenizer, load_tokenizer
from megatron_zebra.data.train_tokenizer import TokenizerJob, train_tokenizer
from megatron_zebra.errors import UserError
from tests.data.corpus import patient

CODE = 'def f(x):\n\tif x:\n\t    return  "a  b"   # ünï 日本 🦓\n\n\n    pass\r\n\x0c\n  trailing  \n'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.py").write_text(
        CODE * 50 + Path(__file__).read_text() + Path(training.__file__).read_text(), newline=""
    )
    train_tokenizer(TokenizerJob([folder / "a.py"], 500, folder / "t.model", control_symbols=["<|im_start|>"]))
    return folder / "t.model"


def hugging_face(path: Path, specials: tuple[str, ...] = ("<|endoftext|>", "<|im_end|>")) -> Path:
    """A byte-level BPE with truncation and padding switched on, as some published files have them."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([CODE * 20], trainer)
    made.enable_truncation(5)
    made.enable_padding(length=50)
    made.save(str(path))
    return path


def check(tokenizer: Tokenizer, eod: str) -> None:
    assert tokenizer.eod_id == tokenizer.token_id(eod)
    for text in (CODE, "", " ", "\n", "\t x", "a" * 999, f"{eod} and <s> are text", "\ufeffx", "e\u0301 \u00e9"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod_id not in ids
        assert all(0 <= number < tokenizer.vocab_size for number in ids)
        assert tokenizer.encode_batch([text, "b"]) == [ids, tokenizer.encode("b")]
    assert tokenizer.token_id("no such token") is None
    assert len(tokenizer.hash) == 64


def test_rows_of_a_model_that_are_no_token_are_no_text(model: Path, tmp_path: Path) -> None:
    for tokenizer in (load_tokenizer(model), load_tokenizer(hugging_face(tmp_path / "tokenizer.json"))):
        assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.vocab_size, tokenizer.vocab_size + 99]) == "ab"


def test_a_trained_tokenizer_gives_text_back_exactly(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    assert (tokenizer.kind, tokenizer.name, tokenizer.vocab_size, tokenizer.eod_id) == (
        "sentencepiece",
        "t.model",
        500,
        2,
    )
    check(tokenizer, "</s>")
    assert tokenizer.token_id("<|im_start|>") == 4
    assert tokenizer.token_id("<pad>") == 3
    assert len(tokenizer.encode("12345")) == 5  # digits are split
    assert len(tokenizer.encode("        return")) <= 3  # a run of spaces is one token


@patient
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60))
def test_any_text_comes_back(model: Path, text: str) -> None:
    tokenizer = load_tokenizer(model)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_hugging_face_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(hugging_face(tmp_path / "tokenizer.json"))
    assert tokenizer.kind == "huggingface"
    check(tokenizer, "<|endoftext|>")
    assert load_tokenizer(tmp_path).hash == tokenizer.hash  # the folder will do
    assert load_tokenizer(tmp_path, "<|im_end|>").eod_id == 1


def test_bad_tokenizers(tmp_path: Path, model: Path) -> None:
    (tmp_path / "text.model").write_text("hello")
    (tmp_path / "half.model").write_bytes(model.read_bytes()[:3000])
    (tmp_path / "empty.model").write_text("")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "folder").mkdir()
    hugging_face(tmp_path / "plain.json", ("<|x|>",))
    for name, message in (
        ("missing.model", "no such file"),
        ("text.model", "not a tokenizer"),
        ("half.model", "not a tokenizer"),
        ("empty.model", "not a tokenizer"),
        ("other.json", r"not a tokenizer\.json"),
        ("broken.json", r"not a tokenizer\.json"),
        ("folder", "a folder without"),
        ("plain.json", r"none of <\|endoftext\|>, .* --eod-token"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_tokenizer(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no token '<eot>' in the vocabulary"):
        load_tokenizer(model, "<eot>")


def test_a_sentencepiece_model_without_eos(tmp_path: Path) -> None:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CODE] * 9), model_writer=out, vocab_size=30, eos_id=-1, minloglevel=2,
        user_defined_symbols=["<|endoftext|>"],
    )  # fmt: skip
    (tmp_path / "x.model").write_bytes(out.getvalue())
    tokenizer = load_tokenizer(tmp_path / "x.model")
    assert tokenizer.eod_id == tokenizer.token_id("<|endoftext|>")


def test_a_sample_bounds_what_is_held(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {n} of many\n" for n in range(20_000)))
    job = TokenizerJob([tmp_path / "a.txt"], 300, tmp_path / "t.model", sample_bytes=50_000)
    sample, size = training._sample(job)
    assert size == (tmp_path / "a.txt").stat().st_size
    assert sum(map(len, sample)) <= 50_000
    numbers = [int(text.split()[1]) for text in sample if text.startswith("line")]
    assert max(numbers) > 15_000  # from all over
    assert training._sample(job)[0] == sample


def test_blocks_are_whole_lines() -> None:
    text = "ab\n" * 3000 + "x" * 5000 + "\nend"
    blocks = list(training._cut(text))
    assert "".join(blocks) == text
    assert max(map(len, blocks)) <= 2000
    assert all(block.endswith("\n") for block in blocks[:4])


def test_training_fails_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc abd abe\n" * 10)
    (tmp_path / "empty.txt").write_text("")
    text, output = [tmp_path / "a.txt"], tmp_path / "t.model"
    for job, message in (
        (TokenizerJob(text, 4000, output), r"--vocab-size 4000: .*too high.*"),
        (TokenizerJob(text, 20, output), r"--vocab-size 20: Vocabulary size is smaller"),
        (TokenizerJob(text, -3, output), r"--vocab-size -3: "),
        (TokenizerJob(text, 10**11, output), "--vocab-size 100000000000: must be from 1"),
        (TokenizerJob(text, 300, output, sample_bytes=float("nan")), "--sample-bytes nan: must be"),
        (TokenizerJob(text, 300, output, sample_bytes=float("inf")), "--sample-bytes inf: must be"),
        (TokenizerJob(text, 300, output, sample_bytes=-5), "--sample-bytes -5: must be"),
        (TokenizerJob(text, 300, output, character_coverage=5), "--character-coverage 5: must be from 0.98 to 1"),
        (TokenizerJob(text, 300, output, control_symbols=[""]), "--control-symbols '': must be new names"),
        (TokenizerJob(text, 300, output, control_symbols=["<s>"]), "--control-symbols '<s>': must be new names"),
        (TokenizerJob(text, 300, output, control_symbols=["A", "A"]), "--control-symbols 'A': must be new names"),
        (TokenizerJob([tmp_path / "empty.txt"], 300, output), "no text in"),
        (TokenizerJob([tmp_path / "none"], 300, output), "no such file or folder"),
        (TokenizerJob(text, 300, tmp_path / "a.txt" / "no" / "t.model"), "Not a directory"),
        (TokenizerJob(text, 300, tmp_path / "a.txt"), "already there"),
        (TokenizerJob(text, 300, output, options=InputOptions(format="jsonl")), "line 1: not JSON"),
    ):
        with pytest.raises(UserError, match=message) as error:
            train_tokenizer(job)
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "empty.txt"]
