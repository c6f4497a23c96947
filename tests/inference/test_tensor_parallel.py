"""Generation over tensor-parallel ranks equals one process: tokens that tp does not divide, more ranks than KV heads."""

from typing import Any

import pytest
import torch

from megatron_zebra.inference.cache import Cache
from megatron_zebra.inference.language_model import LanguageModel
from megatron_zebra.inference.sample import Sampling
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.model.decoder import Decoder
from megatron_zebra.model.initialize import Initializer
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.sharding import Sharding
from megatron_zebra.planning.kv_cache import kv_cache_bytes
from tests.model.test_decoder import make

PROMPTS = [[3, 1, 4, 1, 5], list(range(23)), [9]]
MODEL = {"num_heads": 8, "num_kv_heads": 2, "hidden_size": 64, "init_std": 0.3}


def asked(model: LanguageModel) -> dict[str, Any]:
    cache = Cache(len(PROMPTS))
    logits = model.prefill(cache, [torch.tensor(prompt) for prompt in PROMPTS], 6)
    return {
        "prefill": logits,
        "uncached": model.logits([PROMPTS[1]])[0],
        "greedy": list(model.stream(PROMPTS, 12, Sampling(0.0))),
        "drawn": list(model.stream(PROMPTS, 12, Sampling(1.0, top_k=9), seed=4)),
        "bytes": cache.bytes,
    }


def over_ranks(grid: Grid, arch: Architecture) -> dict[str, Any]:
    sharding = Sharding(grid.tp.size, grid.tp.rank, arch.num_kv_heads)
    init = Initializer(5, 0.3, arch.num_layers, torch.float32, torch.device("cpu"), grid.tp, sharding)
    return asked(LanguageModel(arch, Decoder(arch, init), grid.tp))


@pytest.mark.parametrize("tp", [2, 4])
def test_every_rank_says_what_one_process_says(run_distributed: Any, tp: int) -> None:
    arch, decoder = make(**MODEL)
    want = asked(LanguageModel(arch, decoder))
    for got in run_distributed(over_ranks, tp, arch, tp=tp):
        torch.testing.assert_close(got["prefill"], want["prefill"], rtol=0, atol=1e-4)
        torch.testing.assert_close(got["uncached"], want["uncached"], rtol=0, atol=1e-4)
        assert got["greedy"] == want["greedy"]
        assert got["drawn"] == want["drawn"]
        assert got["bytes"] == sum(kv_cache_bytes(arch, len(prompt), 4, tp) for prompt in PROMPTS)
