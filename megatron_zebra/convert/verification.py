"""Our logits beside transformers', of one sequence that is longer than the window."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_zebra.attention.contract import Segments
from megatron_zebra.convert.load import load_decoder
from megatron_zebra.convert.source import open_model
from megatron_zebra.errors import UserError

BEYOND = 128  # tokens after the window, by default
LEAST = 256


@dataclass(frozen=True)
class Verdict:
    """What was found. ``first``: the first position whose logits differ by more than ``tolerance`` of the largest logit, ``scale``."""

    length: int
    window: int | None
    largest: float
    position: int
    first: int | None
    scale: float
    tolerance: float

    @property
    def equal(self) -> bool:
        return self.first is None

    def __str__(self) -> str:
        window = f", window of {self.window} + 1 keys" if self.window is not None else ""
        found = (
            f"{self.length} random tokens{window}, fp32: the largest difference of a logit is {self.largest:.3g}, at position "
            f"{self.position}: {self.largest / self.scale:.2g} of the largest logit, {self.scale:.3g}"
        )
        if self.first is None:
            return f"{found}\nequal to {self.tolerance:g} of it"
        return f"{found}\nNOT equal to {self.tolerance:g} of it; the first position that differs is {self.first}"


@torch.no_grad()
def verify(
    checkpoint: Path, hf: Path, *, length: int | None, tolerance: float, seed: int = 0, device: str = "auto"
) -> Verdict:
    """Compare the model at ``checkpoint``, run by us, with the folder ``hf``, run by stock transformers, both in fp32."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device")
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    source = open_model(checkpoint)
    arch = source.architecture
    window = arch.window_size if "local" in arch.layer_kinds else None
    length = max(LEAST, (window or 0) + BEYOND) if length is None else length
    if length < 1:
        raise UserError(f"--length {length}: must be 1 or more")
    if not tolerance > 0:
        raise UserError(f"--tolerance {tolerance}: must be more than 0")
    if window is not None and length <= window + 1:
        raise UserError(
            f"--length {length}: nothing would be seen of the window; more than {window + 1} tokens are needed"
        )
    tokens = torch.randint(0, arch.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).to(place)
    model = load_decoder(source, place, torch.float32)
    ours = model(tokens, torch.arange(length, device=place), Segments.from_lengths([length], device=place))
    del model
    assert isinstance(ours, torch.Tensor)
    difference = _differences(ours, _theirs(hf, tokens))
    scale = max(float(ours.abs().max()), 1e-30)
    over = ~(difference <= tolerance * scale)  # so that NaN is over it
    worst = int(difference.nan_to_num(float("inf")).argmax())
    return Verdict(
        length=length,
        window=window,
        largest=float(difference[worst]),
        position=worst,
        first=int(over.nonzero()[0]) if over.any() else None,
        scale=scale,
        tolerance=tolerance,
    )


def _differences(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The largest difference at each position, [T]."""
    if ours.shape != theirs.shape:
        raise UserError(f"the logits are not alike: {list(ours.shape)} here, {list(theirs.shape)} from transformers")
    return torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs)])


def _theirs(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of the folder by transformers, without a cache."""
    try:
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError:
        raise UserError("verify needs transformers (pip install 'megatron-zebra[hf]')") from None
    if not folder.is_dir():
        raise UserError(f"--hf {folder}: is no folder")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except Exception as error:
        raise UserError(f"--hf {folder}: transformers cannot load it ({' '.join(str(error).split())[:200]})") from None
    return loaded.eval().to(tokens.device)(tokens[None], use_cache=False).logits[0].float()
