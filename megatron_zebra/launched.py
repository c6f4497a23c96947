"""What the launcher's environment says of this process: torchrun's variables, or those that a script sets for each rank."""

import os
from dataclasses import dataclass

from megatron_zebra.errors import UserError


@dataclass(frozen=True)
class Launched:
    """``alone``: no launcher started this process; it is the whole world."""

    rank: int
    world_size: int
    local_rank: int
    alone: bool


def launched() -> Launched:
    """Read and check it; UserError naming the variable, told by whichever process has it wrong."""
    if "RANK" not in os.environ:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(
                f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: needs RANK beside it (torchrun sets both)", mine=True
            )
        return Launched(0, 1, 0, True)
    size = _number("WORLD_SIZE", 1, None)
    return Launched(_number("RANK", 0, size - 1), size, _number("LOCAL_RANK", 0, size - 1, "0"), False)


def meeting_place() -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT, where ranks meet that torchrun did not start."""
    address = os.environ.get("MASTER_ADDR")
    if not address:
        raise UserError("MASTER_ADDR: must be the host of rank 0, where RANK is set (torchrun sets it)", mine=True)
    return address, _number("MASTER_PORT", 1, 65535)


def _number(name: str, least: int, most: int | None, default: str | None = None) -> int:
    text = os.environ.get(name, default)
    number = int(text) if text is not None and text.isascii() and text.isdigit() else -1
    if number < least or (most is not None and number > most):
        allowed = f"{least} to {most}" if most is not None else f"from {least}"
        beside = f" with WORLD_SIZE = {os.environ['WORLD_SIZE']}" if name.endswith("RANK") else ""
        given = "is not set" if text is None else f"= {text}"
        raise UserError(f"{name} {given}: must be a whole number {allowed}{beside}", mine=True)
    return number
