"""Values as JSON knows them."""

import math
from typing import Any


def plain(value: Any) -> Any:
    """``value`` with null for nan and infinities, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
