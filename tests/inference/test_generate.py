"""Generation: greedy equals transformers, sampling follows its limits, batches equal single sequences."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

import megatron_zebra
from benchmarks.transformers_model import transformers_cwm
from megatron_zebra.errors import UserError
from megatron_zebra.inference import language_model, room
from megatron_zebra.inference.language_model import LanguageModel
from megatron_zebra.inference.load import check_tp, tokenizer_of
from megatron_zebra.inference.sample import Sampling, next_tokens, probabilities
from tests.data.chatting import chat_tokenizer
from tests.model.test_decoder import make


def model(**more: Any) -> LanguageModel:
    return LanguageModel(*make(init_std=0.3, **more))


def test_greedy_tokens_equal_transformers_far_beyond_the_window() -> None:
    arch, decoder = make(init_std=0.3)
    theirs = transformers_cwm(arch, decoder, "eager").eval()
    ids = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(1))
    want = theirs.generate(ids, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = LanguageModel(arch, decoder).generate(ids, max_new_tokens=60, temperature=0, prefill_chunk=8)
    assert torch.equal(got, want)
    assert len(set(got[0, 21:].tolist())) > 5  # not one token over and over


def test_unequal_prompts_go_on_as_each_alone_and_end_apart() -> None:
    asked = model()
    prompts = [[5, 6, 7], list(range(30)), [1]]
    steps = list(asked.stream(prompts, 12, Sampling(0.0)))
    together = [[step[i] for step in steps] for i in range(3)]
    for prompt, got in zip(prompts, together):
        assert asked.generate([prompt], 12)[0, len(prompt) :].tolist() == got
    stop = together[1][3]
    ended = [[step[i] for step in asked.stream(prompts, 12, Sampling(0.0), stop_tokens=[stop])] for i in range(3)]
    for whole, cut in zip(together, ended):
        last = whole.index(stop) + 1 if stop in whole else 12
        assert cut == (whole[:last] + [None] * 12)[: len(cut)]


def test_a_prompt_that_is_no_longer_wanted_costs_nothing_more() -> None:
    asked = model()
    prompts = [[5, 6, 7], [1]]
    whole = list(asked.stream(prompts, 6, Sampling(0.0)))
    asked_for, decode = [], asked.decode
    with patch.object(
        asked,
        "decode",
        side_effect=lambda cache, tokens, sequences: (
            asked_for.append(list(sequences)) or decode(cache, tokens, sequences)
        ),
    ):
        told: list[list[int | None]] = []
        for step in asked.stream(prompts, 6, Sampling(0.0), wanted=lambda number: number == 1 or len(told) < 2):
            told.append(step)
    assert told == [*whole[:2], *([None, later[1]] for later in whole[2:])]
    assert asked_for == [[0, 1], *[[1]] * 4]


def test_a_seed_repeats_and_another_differs() -> None:
    asked = model()
    drawn = [asked.generate([[1, 2, 3]], 20, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    "limits", [{"temperature": 1e-45}, {"repetition_penalty": 1e-300}, {"repetition_penalty": 1e300}]
)
def test_the_ends_of_what_is_allowed_still_draw(limits: dict[str, Any]) -> None:
    scores = torch.tensor([[3.0, 2.0, -1.0], [-3.0, -2.0, -1.0]])
    for sampling in (Sampling(**limits), Sampling(**limits, top_k=1), Sampling(**limits, top_p=0.5, min_p=1.0)):
        assert next_tokens(scores, sampling, torch.ones(2, 3, dtype=torch.bool)).max() < 3
    assert next_tokens(scores, Sampling(temperature=1e-45)).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("ids", "line"),
    [
        ([], "there is no prompt"),
        (torch.zeros(0, 3, dtype=torch.int64), "there is no prompt"),
        ([[]], "prompt 0: is empty"),
        ([1, 2], r"prompt 0: is int64 \[\]; must be whole numbers \[T\]"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"prompt 0: is int64 \[2, 3\]"),
        (torch.tensor([[1.7, 2.0]]), r"prompt 0: is float32 \[2\]"),
        ([[True]], r"prompt 0: is bool \[1\]"),
        ([[2**70]], r"prompt 0: is \[1180591620717411303424\]; must be whole numbers"),
        (["ab"], "prompt 0: is 'ab'; must be whole numbers"),
        ([[1, 2], [3]], "prompts of 1 to 2 tokens: must be of one length"),
        ([[1], [-1]], "prompt 1: token -1 is outside the vocabulary"),
    ],
)
def test_ids_that_are_none_are_told(ids: Any, line: str) -> None:
    asked = model()
    with pytest.raises(UserError, match=line):
        asked.generate(ids, 2)
    with pytest.raises(UserError, match=line):
        asked.logits(ids)


@pytest.mark.parametrize("wrong", [{"seed": 2**64}, {"seed": -1}, {"prefill_chunk": 0}, {"max_new_tokens": 0}])
def test_what_is_wrong_is_told_before_a_token_is_asked_for(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}: must be"):
        model().stream([[1]], **{"max_new_tokens": 1, "sampling": Sampling(0.0), **wrong})  # type: ignore[arg-type]


def test_a_device_of_another_name_is_no_silent_cpu() -> None:
    with pytest.raises(UserError, match="device cuda:0: must be auto, cpu or cuda"):
        megatron_zebra.load("none", device="cuda:0")


def test_logits_beyond_the_memory_say_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda device: 97 * 4 * 100)
    assert model().logits([[1] * 90]).shape == (1, 90, 97)
    with pytest.raises(UserError, match=r"2 x 90 tokens: their logits need .* 45 tokens each would fit"):
        model().logits([[1] * 90] * 2)


def test_logits_are_fp32_whatever_the_weights_are_and_equal_those_by_chunks() -> None:
    asked = model()
    asked.decoder.bfloat16()
    logits = asked.logits([[1] * 30])
    assert logits.dtype == torch.float32
    asked.decoder.float()
    whole = asked.logits([[1, 2, 3] * 10])
    with patch.object(language_model, "PREFILL_CHUNK", 7):
        torch.testing.assert_close(asked.logits([[1, 2, 3] * 10]), whole, rtol=0, atol=1e-5)
    pieces = torch.cat(list(asked.logit_chunks([1, 2, 3] * 10, 7)))
    torch.testing.assert_close(pieces, whole[0], rtol=0, atol=1e-4)


def test_ranks_that_cannot_divide_the_model_are_told() -> None:
    arch, _ = make(num_heads=6, num_kv_heads=3, hidden_size=48, ffn_hidden_size=50)
    with pytest.raises(UserError, match="3 processes: must divide the model's 6 heads and 50 columns of the MLP"):
        check_tp(arch, 3, "3 processes")


def test_a_gguf_file_s_tokenizer_is_beside_it(tmp_path: Path) -> None:
    chat_tokenizer(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    source: Any = SimpleNamespace(folder=tmp_path / "model.gguf", architecture=SimpleNamespace(vocab_size=300))
    tokenizer, place = tokenizer_of(source, None)
    assert (tokenizer.vocab_size, place) == (300, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"none is beside the model \(.*: a folder without tokenizer.json"):
        tokenizer_of(source, None)


def test_limits_leave_the_right_tokens() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]])
    full = scores.softmax(-1)
    assert torch.allclose(probabilities(scores, Sampling()), full)
    assert probabilities(scores, Sampling(top_k=2))[0].nonzero().flatten().tolist() == [0, 1]
    # 0.636 + 0.234 < 0.9 <= 0.636 + 0.234 + 0.086
    assert probabilities(scores, Sampling(top_p=0.9))[0].nonzero().flatten().tolist() == [0, 1, 2]
    assert probabilities(scores, Sampling(top_p=1e-6))[0].tolist() == [1, 0, 0, 0, 0]
    assert probabilities(scores, Sampling(min_p=0.3))[0].nonzero().flatten().tolist() == [0, 1]
    assert torch.allclose(probabilities(scores, Sampling(temperature=2.0)), (scores / 2).softmax(-1))
    generator = torch.Generator().manual_seed(0)
    drawn = next_tokens(scores.expand(4000, -1), Sampling(), None, generator)
    assert torch.allclose(drawn.bincount(minlength=5) / 4000, full[0], atol=0.03)


def test_what_was_seen_is_said_less() -> None:
    scores, seen = torch.tensor([[2.0, 1.9, -1.0]]), torch.tensor([[True, False, True]])
    assert next_tokens(scores, Sampling(0.0), seen).item() == 0
    assert next_tokens(scores, Sampling(0.0, repetition_penalty=1.5), seen).item() == 1
    asked = model()
    plain, penalized = (asked.generate([[3, 3]], 30, repetition_penalty=penalty)[0] for penalty in (1.0, 5.0))
    assert len(set(penalized.tolist())) > len(set(plain.tolist()))


@pytest.mark.parametrize(
    ("ids", "more", "line"),
    [
        ([[]], {}, "prompt 0: is empty"),
        ([[1, 97]], {}, "prompt 0: token 97 is outside the vocabulary 0 .. 96"),
        ([[-1]], {}, "prompt 0: token -1 is outside"),
        ([[1]], {"temperature": -1.0}, "temperature -1.0: must be 0 (greedy) or more"),
        ([[1]], {"top_k": 0}, "top_k 0: must be 1 or more"),
        ([[1]], {"top_p": 1.5}, "top_p 1.5: must be above 0 and at most 1"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty 0.0: must be above 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0: must be 1 or more"),
    ],
)
def test_bad_input_is_one_line(ids: Any, more: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        model().generate(ids, **({"max_new_tokens": 2} | more))
    assert str(error.value).startswith(line)


def test_a_prompt_beyond_the_memory_is_told_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = model(layer_kinds=["global", "local", "local", "local", "global"])
    per_token = 2 * 2 * 16 * 4
    slots = 2 * 3 * 1024 + 3 * 8 + 2 * 1024  # of two global and three local layers; one's that is copied into more room
    monkeypatch.setattr(room, "free_bytes", lambda device: int(slots * per_token / room.SHARE) + 9)
    assert asked.generate([[1] * 3000], 72).shape == (1, 3072)
    with pytest.raises(UserError, match=r"1 sequence of up to 3,073 tokens: .*; 3,072 tokens each would fit"):
        asked.generate([[1] * 3000], 73)
    room.check_room(asked.arch, asked.decoder, [3072])
    with pytest.raises(UserError, match=r"1 sequence of up to 3,072 tokens: .* 1,024 tokens each would fit"):
        room.check_room(asked.arch, asked.decoder, [3072], tp=4)  # on one machine, which they share


def test_a_container_s_limit_is_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").write_text("4:memory:/old\n0::/job/step\n")
    for name, limit, used, cached in (("job", "1000", 700, 50), ("job/step", "max", 10, 0)):
        (tmp_path / name).mkdir()
        for file, text in (("max", limit), ("current", str(used)), ("stat", f"anon 1\ninactive_file {cached}")):
            (tmp_path / name / f"memory.{file}").write_text(f"{text}\n")
    assert list(room._left_to_groups(tmp_path, tmp_path / "own")) == [1000 - 700 + 50]
    assert list(room._left_to_groups(tmp_path / "none", tmp_path / "own")) == []
    assert list(room._left_to_groups(tmp_path, tmp_path / "none")) == []
    free = room.free_bytes(torch.device("cpu"))
    monkeypatch.setattr(room, "_left_to_groups", lambda: [12345])
    assert free is not None
    assert free > room.free_bytes(torch.device("cpu")) == 12345
