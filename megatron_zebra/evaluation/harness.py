"""A model as lm-eval asks it: likelihoods of continuations, and greedy or drawn generation up to a stop."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megatron_zebra.data.tokenizer import Tokenizer
from megatron_zebra.errors import UserError
from megatron_zebra.inference.language_model import LanguageModel
from megatron_zebra.inference.packed import packed_states
from megatron_zebra.inference.sample import Sampling
from megatron_zebra.inference.text import Streamed
from megatron_zebra.parallel.group import Group

_TOKENS_AT_ONCE = 8192  # of one forward
_LOGITS_AT_ONCE = 1024  # positions whose logits exist at once

Request = tuple[Any, list[int], list[int]]  # lm-eval's name of it, context, continuation
T = TypeVar("T")


class HarnessModel(TemplateLM):
    """``model`` with its tokenizer. The ranks of ``data`` share the requests out; each of them is told every result.

    Args:
        ends: tokens that end a generated text.
        start: the token after which a text without a context begins, where the tokenizer's own rules put none before it.
        max_length: tokens of a request at most; what is longer loses its beginning.
        batch_size: texts generated together.
        bos: put the tokenizer's own beginning-of-sequence token before each text, where its rules have one.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        data: Group,
        ends: Sequence[int],
        start: int,
        max_length: int,
        batch_size: int,
        bos: bool = True,
        show: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.text, self.data, self.ends = model, tokenizer, data, tuple(ends)
        self.max_length, self.batch_size, self.show = max_length, batch_size, show
        self.prefix = tokenizer.prefix if bos else []
        self.start = self.prefix[0] if self.prefix else start
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        return self.text.eod_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self.text.encode(string)
        return ids if add_special_tokens is False else [*self.prefix, *ids]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._shared(requests, lambda own: super(HarnessModel, self).loglikelihood(own, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        def compute(own: list[Any]) -> list[float]:
            windows = [list(self._windows(*request.args)) for request in own]
            scored = iter(self._loglikelihood_tokens([one for windows_of in windows for one in windows_of]))
            return [sum(next(scored)[0] for _ in windows_of) for windows_of in windows]

        return self._shared(requests, compute)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._shared(requests, lambda own: self._generate([request.args for request in own]))

    def _windows(self, text: str) -> Iterator[Request]:
        """Each token of ``text`` once, the first after the prefix token, the rest after as much as there is room for."""
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        for context, continuation in map(make_disjoint_window, windows):
            yield None, context, continuation

    def _shared(self, requests: list[Any], compute: Callable[[list[Any]], list[T]]) -> list[T]:
        """What ``compute`` finds for all requests, in order; this rank computes its share."""
        size = self.data.size
        own = compute(requests[self.data.rank :: size])
        if size == 1:
            return own
        parts: list[Any] = [None] * size
        dist.all_gather_object(parts, own, group=self.data.handle)
        return [parts[number % size][number // size] for number in range(len(requests))]

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        """Choices of one token after one context, and all requests of equal inputs, share a forward."""
        by_inputs: dict[tuple[int, ...], list[int]] = {}
        for number, (_name, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"--max-length {self.max_length}: a task has a continuation of {len(continuation)} tokens, which must fit"
                )
            inputs = (context + continuation)[-self.max_length - 1 : -1]
            by_inputs.setdefault(tuple(inputs), []).append(number)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with self._bar(len(requests), "likelihoods") as bar:
            for batch in _batches(list(by_inputs)):
                ends = accumulate(map(len, batch))
                asked = [(end, number) for end, inputs in zip(ends, batch) for number in by_inputs[inputs]]
                scored = self._score(batch, [(end, requests[number][2]) for end, number in asked])
                for (_end, number), result in zip(asked, scored):
                    found[number] = result
                bar.update(len(asked))
        return found

    def _score(
        self, texts: Sequence[tuple[int, ...]], asked: Sequence[tuple[int, list[int]]]
    ) -> Iterator[tuple[float, bool]]:
        """Of each continuation, whose last token follows packed token ``end - 1``: log-likelihood, and whether greedy."""
        assert self.model.decoder.head is not None
        states = packed_states(self.model.decoder, [torch.tensor(text, device=self.device) for text in texts])
        at = torch.cat([torch.arange(end - len(wanted), end) for end, wanted in asked]).to(self.device)
        target = torch.tensor([token for _, wanted in asked for token in wanted], dtype=torch.int64, device=self.device)
        scores, greedy = [], []
        for place, token in zip(at.split(_LOGITS_AT_ONCE), target.split(_LOGITS_AT_ONCE)):
            with torch.no_grad():
                logits = self.model.decoder.head.logits(states[place]).float()
            scores.append(logits.log_softmax(-1).gather(1, token[:, None])[:, 0])
            greedy.append(logits.argmax(-1) == token)
        sizes = [len(wanted) for _, wanted in asked]
        for score, good in zip(torch.cat(scores).split(sizes), torch.cat(greedy).split(sizes)):
            yield float(score.sum()), bool(good.all())

    def _generate(self, requests: list[tuple[str, dict[str, Any]]]) -> list[str]:
        by_settings: dict[str, list[int]] = {}
        for number, (_, given) in enumerate(requests):
            by_settings.setdefault(json.dumps(given, sort_keys=True), []).append(number)
        found = [""] * len(requests)
        with self._bar(len(requests), "generation") as bar:
            for settings, numbers in by_settings.items():
                for first in range(0, len(numbers), self.batch_size):
                    batch = numbers[first : first + self.batch_size]
                    texts = self._complete([requests[number][0] for number in batch], json.loads(settings))
                    for number, text in zip(batch, texts):
                        found[number] = text
                    bar.update(len(batch))
        return found

    def _complete(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        asked: Any = normalize_gen_kwargs(settings)
        until, new = asked["until"], asked["max_gen_toks"]
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        ends = {*self.ends, *(number for number in map(self.text.token_id, stops) if number in self.text.special)}
        room = self.max_length - new
        if room < 1:
            raise UserError(
                f"--max-length {self.max_length}: a task generates {new} tokens, which leaves no room for its text"
            )
        drawn = {name: asked.get(name) for name in ("top_k", "top_p", "min_p")} if asked["do_sample"] else {}
        sampling = Sampling(asked["temperature"] if asked["do_sample"] else 0.0, **drawn)
        prompts = [(self.tok_encode(context) or [self.prefix_token_id])[-room:] for context in contexts]
        texts = [Streamed(self.text, prompt, stops) for prompt in prompts]
        whole = [""] * len(prompts)
        for step in self.model.stream(prompts, new, sampling, stop_tokens=sorted(ends)):
            for number, token in enumerate(step):
                if token is not None and token not in ends | self.text.special:
                    whole[number] += texts[number].add(token)
            if all(token is None or text.stopped for token, text in zip(step, texts)):
                break
        return [text + streamed.rest() for text, streamed in zip(whole, texts)]

    def _bar(self, total: int, what: str) -> Any:
        return tqdm(total=total, desc=what, unit="request", disable=None if self.show else True, leave=None)


def _batches(texts: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Texts whose tokens together are one forward's, or a single longer one."""
    batch: list[tuple[int, ...]] = []
    for text in texts:
        if batch and sum(map(len, batch)) + len(text) > _TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch
