"""Conversations: from a line of JSON to checked messages, with the place that each came from."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from megatron_zebra.data.documents import json_object, stop
from megatron_zebra.data.inputs import Chunk
from megatron_zebra.errors import UserError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
_SAME = {"human": "user", "gpt": "assistant"}  # names in the {"from", "value"} form


class Conversation(NamedTuple):
    """``where`` it stands (file and line), its messages, and what its maker says of it ({} if nothing)."""

    where: str
    messages: list[Message]
    meta: dict[str, Any]


def conversations(chunk: Chunk, on_bad: Callable[[UserError], None] = stop) -> Iterator[Conversation]:
    """Each line of a JSON-lines chunk; ``on_bad`` gets the error of each that is not one."""
    if isinstance(chunk.data, list) or chunk.format != "jsonl":
        raise UserError(
            f"{chunk.path}: conversations are read from JSON lines, not from {chunk.format} (--format jsonl)"
        )
    for number, line in enumerate(chunk.data.split(b"\n"), chunk.first):
        if line.strip():
            where = f"{chunk.path}, line {number}"
            try:
                value = json_object(line, where)
                messages = read_messages(value, where)
            except UserError as error:
                on_bad(error)
            else:
                meta = value.get("meta")
                yield Conversation(where, messages, meta if isinstance(meta, dict) else {})


def read_messages(value: dict[str, Any], where: str) -> list[Message]:
    """The messages of {"messages": [{"role", "content"}, ...]} or {"conversations": [{"from", "value"}, ...]}.

    Further keys of a message stay, for the template. UserError beginning with ``where`` if a message has an unknown role
    or no text, or if nothing is said by the assistant.
    """
    key = next((key for key in ("messages", "conversations") if key in value), None)
    if key is None:
        raise UserError(f"{where}: no key 'messages' or 'conversations'; there are {_some(value)}")
    turns = value[key]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: {key!r} must be a list of messages, not {_short(turns)}")
    messages = [_message(turn, f"{where}, message {number}") for number, turn in enumerate(turns, 1)]
    if all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{where}: no turn of the assistant in {len(messages)} messages, so nothing to learn")
    return messages


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: {_short(turn)} instead of an object with role and content")
    old = "from" in turn and "role" not in turn
    role_key, text_key = ("from", "value") if old else ("role", "content")
    role, text = turn.get(role_key), turn.get(text_key)
    role = _SAME.get(role, role) if old and isinstance(role, str) else role
    if role not in ROLES:
        more = f" (and {', '.join(_SAME)})" if old else ""
        raise UserError(f"{where}: {role_key} = {_short(role)}; allowed are {', '.join(ROLES)}{more}")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {text_key} = {_short(text)}; text is needed")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {text_key} holds half of a surrogate pair, which is no character") from None
    return {key: kept for key, kept in turn.items() if key not in (role_key, text_key)} | {
        "role": role,
        "content": text,
    }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _some(value: dict[str, Any]) -> str:
    return ", ".join(map(repr, list(value)[:10])) or "none"
