"""In which collective a process stands, read from its Python frames: for those that do not pass through ``Group``."""

import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from traceback import walk_tb
from types import FrameType

import torch.distributed as dist

SAVE_THREAD = "save"
_PACKAGE = str(Path(__file__).resolve().parent.parent)
_WATCH = str(Path(__file__).resolve().with_name("watch.py"))
_COMMUNICATION = ("/torch/distributed/", "/deepspeed/comm/")


def of_process() -> str:
    """Where the main thread is now; or, if it runs a backward pass on a device, that pass's thread in a collective."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread.name == SAVE_THREAD and thread.ident is not None:
            frames.pop(thread.ident, None)  # it may wait in a collective too, which holds nobody up
    places = [frames.pop(main)] if (main := threading.main_thread().ident) in frames else []
    for frame in [*places, *frames.values()]:
        if _communicates(frame):
            return _place(_outwards(frame))
    return _place(_outwards(places[0])) if places else "at no known place"


def of_error(error: BaseException) -> str:
    """Where ``error`` was raised."""
    return _place(reversed([frame for frame, _ in walk_tb(error.__traceback__)]))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        if frame.f_code.co_filename != _WATCH:  # its handler of SIGTERM may stand on top
            yield frame
        frame = frame.f_back


def _communicates(frame: FrameType) -> bool:
    return any(part in frame.f_code.co_filename for part in _COMMUNICATION)


def _place(frames: Iterable[FrameType]) -> str:
    """``frames``, the innermost first, in words: the collective if there is one, and the line of ours that led there."""
    what, ranks, line = "", "", ""
    for frame in frames:
        if _communicates(frame) and not line:
            what = what or frame.f_code.co_name.replace("_", "-")
            ranks = ranks or (_ranks(frame.f_locals["group"]) if "group" in frame.f_locals else "")
        elif frame.f_code.co_filename.startswith(_PACKAGE):
            line = f"{Path(frame.f_code.co_filename).relative_to(_PACKAGE)}, line {frame.f_lineno}"
            break
    if not what:
        return f"in no collective ({line or 'outside training'})"
    return f"in {what}{ranks}" + (f" ({line})" if line else "")


def _ranks(group: object) -> str:
    try:
        ranks = dist.get_process_group_ranks(group)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return f" of ranks {', '.join(map(str, ranks))}"
