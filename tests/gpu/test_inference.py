"""The KV cache on a GPU: every chunking gives the logits of no cache, in bf16."""

import pytest
import torch

from megatron_zebra.inference.cache import Cache
from megatron_zebra.inference.language_model import LanguageModel
from megatron_zebra.parallel.grid import Grid
from tests.inference.test_cache import KINDS, WINDOW, prompts
from tests.model.test_decoder import make

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("chunk", [1, WINDOW, WINDOW + 1, 1000])
def test_every_chunking_equals_no_cache(gpu: Grid, kinds: str, chunk: int) -> None:
    arch, decoder = make(layer_kinds=KINDS[kinds], dtype=torch.bfloat16, device=gpu.device)
    asked = LanguageModel(arch, decoder)
    texts = prompts()
    want = torch.stack([asked.logits(text[None])[0, -1] for text in texts]).float()
    got = asked.prefill(Cache(len(texts)), [text.to(gpu.device) for text in texts], chunk).float()
    assert (got - want.to(got.device)).abs().max() <= 2e-2 * want.abs().max()


def test_generation_on_the_gpu_goes_on_as_recomputation_does(gpu: Grid) -> None:
    arch, decoder = make(init_std=0.3, dtype=torch.bfloat16, device=gpu.device)
    asked = LanguageModel(arch, decoder)
    out = asked.generate([prompts((30,))[0]], max_new_tokens=20, temperature=0)[0]
    logits = asked.logits(out[None, :-1])[0, 29:].float()
    chosen = logits.gather(1, out[30:, None].to(logits.device))[:, 0]
    # bf16 may turn a tie: what was chosen is as good as the best, to its rounding.
    assert (chosen >= logits.max(1).values - 2e-2 * logits.abs().max()).all()
