"""A number of tokens where there is little room."""


def short(tokens: int) -> str:
    """4096 is 4k; what is no multiple of 1024 stays as it is."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
