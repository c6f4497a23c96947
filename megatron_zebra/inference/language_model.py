"""A model to ask: logits, and tokens that go on from prompts."""

from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_zebra.attention.attending import Attending
from megatron_zebra.attention.segments import Segments
from megatron_zebra.errors import UserError
from megatron_zebra.inference.cache import Cache
from megatron_zebra.inference.packed import packed_states
from megatron_zebra.inference.room import check_logits_room, check_room
from megatron_zebra.inference.sample import Sampling, next_tokens
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.parallel.group import Group
from megatron_zebra.parallel.tensor import gather_sequence

PREFILL_CHUNK = 2048
SEEDS = 2**64  # what a generator takes is below
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)

Prompts = torch.Tensor | Sequence[torch.Tensor | Sequence[int]]


class LanguageModel:
    """A decoder and what it takes to run it without training. Under tensor parallelism all ranks call together."""

    def __init__(self, arch: Architecture, decoder: Decoder, tp: Group | None = None) -> None:
        self.arch, self.decoder = arch, decoder.eval()
        self.tp = tp or Group.alone("tp")
        self.device = next(decoder.parameters()).device

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor | Sequence[Sequence[int]]) -> torch.Tensor:
        """Of every token, without a cache. ids: [B, T] -> [B, T, V], fp32 whatever the model's precision.

        Raises:
            UserError: ids that are no whole numbers of the vocabulary, or more logits than the memory holds.
        """
        rows = self._checked(ids)
        _same_length(rows, "logit_chunks() takes one at a time")
        check_logits_room(self.arch, self.device, len(rows), len(rows[0]))
        head = self.decoder.head
        assert head is not None
        logits = torch.empty(len(rows), len(rows[0]), self.arch.vocab_size, device=self.device)
        for out, row in zip(logits, rows):
            states = packed_states(self.decoder, [row.to(self.device)])
            for part, some in zip(out.split(PREFILL_CHUNK), states.split(PREFILL_CHUNK)):
                part.copy_(head.logits(some))
        return logits

    @torch.no_grad()
    def logit_chunks(self, prompt: torch.Tensor | Sequence[int], chunk: int = PREFILL_CHUNK) -> Iterator[torch.Tensor]:
        """Of every token of one prompt [T], in order, those of ``chunk`` tokens at a time: [n, V]. Keeps the keys alone.

        Raises:
            UserError: a token outside the vocabulary, or a prompt too long for the memory.
        """
        (row,) = self._checked([prompt])
        check_room(self.arch, self.decoder, [len(row)], self.tp.size)
        cache = Cache(1)
        for part in row.to(self.device).split(chunk):
            yield self._extend(cache, {0: len(part)}, part, torch.arange(len(part)))

    @torch.inference_mode()
    def prefill(self, cache: Cache, prompts: Sequence[torch.Tensor], chunk: int = PREFILL_CHUNK) -> torch.Tensor:
        """Take each prompt into ``cache``, ``chunk`` tokens at a time; the logits of each one's last token [B, V]."""
        last = []
        for sequence, prompt in enumerate(prompts):
            for part in prompt.split(chunk):
                logits = self._extend(cache, {sequence: len(part)}, part)
            last.append(logits)
        return torch.cat(last)

    @torch.inference_mode()
    def decode(self, cache: Cache, tokens: torch.Tensor, sequences: Sequence[int]) -> torch.Tensor:
        """One further token of each of ``sequences``: tokens [n] -> logits [n, V]."""
        return self._extend(cache, dict.fromkeys(sequences, 1), tokens)

    def generate(
        self,
        ids: Prompts,
        max_new_tokens: int,
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] = (),
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> torch.Tensor:
        """Prompts [B, T] -> [B, T + new]; a row that ended earlier is filled up with its stop token.

        Raises:
            UserError: a value that is not allowed, a token outside the vocabulary, or a prompt too long for the memory.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        prompts = self._checked(ids)
        _same_length(prompts, "stream() takes any")
        rows = [prompt.tolist() for prompt in prompts]
        for step in self.stream(ids, max_new_tokens, sampling, seed, stop_tokens, prefill_chunk):
            for row, token in zip(rows, step):
                row.append(row[-1] if token is None else token)
        return torch.tensor(rows)

    def stream(
        self,
        ids: Prompts,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        stop_tokens: Sequence[int] = (),
        prefill_chunk: int = PREFILL_CHUNK,
        wanted: Callable[[int], bool] = lambda prompt: True,
    ) -> Iterator[list[int | None]]:
        """Yields one new token of each prompt at a time, None for one that has ended (its stop token is its last).

        Closing the iterator ends the generation, and of a prompt whose number is no longer ``wanted`` (asked before each
        further token) its own. Prompts may differ in length. What is wrong is told before the first token is asked for.
        """
        if problem := sampling.problem():
            raise UserError(problem)
        for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise UserError(f"{name} {value}: must be 1 or more")
        if not 0 <= seed < SEEDS:
            raise UserError(f"seed {seed}: must be from 0 to 2**64 - 1")
        prompts = self._checked(ids)
        check_room(self.arch, self.decoder, [len(prompt) + max_new_tokens for prompt in prompts], self.tp.size)
        generator = torch.Generator(self.device).manual_seed(seed)
        return self._steps(prompts, max_new_tokens, sampling, generator, stop_tokens, prefill_chunk, wanted)

    def _steps(
        self,
        prompts: list[torch.Tensor],
        max_new_tokens: int,
        sampling: Sampling,
        generator: torch.Generator,
        stop_tokens: Sequence[int],
        prefill_chunk: int,
        wanted: Callable[[int], bool],
    ) -> Iterator[list[int | None]]:
        seen = None
        if sampling.repetition_penalty != 1.0:
            seen = torch.zeros(len(prompts), self.arch.vocab_size, dtype=torch.bool, device=self.device)
            for row, prompt in zip(seen, prompts):
                row[prompt.to(self.device)] = True
        cache = Cache(len(prompts))
        alive = list(range(len(prompts)))
        logits = self.prefill(cache, [prompt.to(self.device) for prompt in prompts], prefill_chunk)
        for number in range(max_new_tokens):
            tokens = next_tokens(logits, sampling, None if seen is None else seen[alive], generator)
            if seen is not None:
                seen[alive, tokens] = True
            chosen = dict(zip(alive, tokens.tolist()))
            yield [chosen.get(sequence) for sequence in range(len(prompts))]
            going = [i for i, sequence in enumerate(alive) if chosen[sequence] not in stop_tokens and wanted(sequence)]
            alive = [alive[i] for i in going]
            if not alive or number + 1 == max_new_tokens:
                return
            logits = self.decode(cache, tokens[going], alive)

    def _extend(
        self, cache: Cache, new: dict[int, int], tokens: torch.Tensor, at: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [n, V] of the last new token of each sequence, or of the tokens ``at``."""
        step = cache.step(new, padding=-len(tokens) % self.tp.size)
        if at is None:
            at = torch.tensor(list(new.values())).cumsum(0) - 1
        tokens = torch.nn.functional.pad(tokens, (0, step.padding))
        logits = self._run(tokens, step.positions().to(self.device), step, at.to(self.device))
        step.done()
        return logits

    def _run(
        self, tokens: torch.Tensor, positions: torch.Tensor, keys: Segments | Attending, at: torch.Tensor
    ) -> torch.Tensor:
        states = self.decoder.states(tokens, positions, keys)
        assert self.decoder.head is not None
        return self.decoder.head.logits(gather_sequence(states, self.tp)[at])

    def _checked(self, ids: Prompts) -> list[torch.Tensor]:
        """Each prompt [T] int64 on the host."""
        given = [_row(number, row) for number, row in enumerate(ids)]
        if not given:
            raise UserError("there is no prompt; at least one is needed")
        for number, row in enumerate(given):
            if not row.numel():
                raise UserError(f"prompt {number}: is empty; at least one token is needed")
            if row.ndim != 1 or row.dtype not in WHOLE:
                what = f"{str(row.dtype).removeprefix('torch.')} {list(row.shape)}"
                raise UserError(
                    f"prompt {number}: is {what}; must be whole numbers [T], in a batch [B, T] of one or more"
                )
        rows = [row.to(torch.int64) for row in given]
        for number, row in enumerate(rows):
            low, high = row.min().item(), row.max().item()
            if low < 0 or high >= self.arch.vocab_size:
                wrong = low if low < 0 else high
                raise UserError(
                    f"prompt {number}: token {wrong} is outside the vocabulary 0 .. {self.arch.vocab_size - 1}"
                )
        return rows


def _row(number: int, row: torch.Tensor | Sequence[int]) -> torch.Tensor:
    try:
        return torch.as_tensor(row).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch's words for a text, a number too large, ...
        shown = repr(row)
        raise UserError(
            f"prompt {number}: is {shown if len(shown) < 100 else shown[:100] + '...'}; must be whole numbers of the vocabulary"
        ) from None


def _same_length(prompts: Sequence[torch.Tensor], other: str) -> None:
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) > 1:
        raise UserError(f"prompts of {lengths[0]} to {lengths[-1]} tokens: must be of one length; {other}")
