"""Notice that a rank has died or failed, and end the others: nobody waits for ever in a collective.

Every rank beats once a second in the group's store and looks at one other, the next in a ring (past those that have left
properly). Whoever finds its next rank dead, and whoever fails itself, publishes a verdict under one key that all read with
each beat; the first verdict is the one that counts. A rank thus touches three or four keys a beat, however many ranks there are.

A rank is dead when
  - its process is gone, as its neighbour on the same machine can see (within a beat), or
  - it was silent for 20 s, counted in beats of the neighbour, so that a stop of the neighbour itself does not count;
  - for rank 0 of a run without torchrun: the store that it keeps broke off (at once) or was silent for 20 s.
A beat needs no more than a moment of Python, so compiling, reading, saving, a loaded machine, seconds without the
interpreter's lock or a stop of some seconds are not death. A rank that lives but never comes to a collective is not dead
either: for that there is ``parallel.timeout``.

After a verdict a rank says one line and its main thread gets three beats to end by itself, as most do, since gloo breaks off
collectives with the dead; then the process is ended, wherever its main thread hangs. A hung NCCL collective never
raises, and is ended in this way. (Run with gloo only; with NCCL, torch's own watchdog may end a process first, with its own words.)

torchrun sends SIGTERM to all as soon as one worker ends, and SIGKILL 30 s later. Where SIGTERM would end this process without
a word, it is put off for three beats, in case there is a verdict.
"""

import contextlib
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import torch.distributed as dist

from megatron_zebra.errors import RankLost, UserError, tell
from megatron_zebra.parallel import whereabouts
from megatron_zebra.parallel.process_name import host_of, is_gone, this_process
from megatron_zebra.parallel.standstill import Standstill, last_report
from megatron_zebra.parallel.verdict import Verdict, publish, published

_KEYS = "megatron_zebra/watch"
_SPEAKERS = 8  # ranks that say a verdict on stderr; every rank writes it to its log
_BROKEN = ("gloo", "NCCL", "Connection closed", "Connection reset")  # in torch's RuntimeErrors of a broken collective


@dataclass(frozen=True)
class Pace:
    """``beat``: seconds between beats; ``silence``: seconds without one after which a rank counts as dead; ``still``: seconds
    without progress after which it is told where all ranks are (0: never).
    """

    beat: float = 1.0
    silence: float = 20.0
    still: float = 0.0

    @property
    def grace(self) -> float:
        """Seconds for a thing that needs the others to have beaten once: they read a verdict, or publish it."""
        return 3 * self.beat


@contextlib.contextmanager
def watched(
    store: dist.Store,
    rank: int,
    size: int,
    name: Callable[[int], str],
    keeper: int | None,
    pace: Pace,
    close: Callable[[], None],
) -> Iterator["Watch"]:
    """Watch the others and be watched, from here to the end of the context.

    An error that leaves it is told to the others. A UserError is printed here, by the first rank that meets one; the others
    end quietly. An error of a broken collective becomes a RankLost, once it is known who was lost.

    Args:
        store: where the ranks meet.
        name: a rank in words.
        keeper: the rank whose process keeps the store; None = a process that is no rank.
        close: called at the end, however that comes; after the others know of it and while the watch still goes on, since
            what it closes may hang.
    """
    watch = Watch(store, rank, size, name, keeper, pace)
    with watch.sigterm_put_off():
        watch.start()
        try:
            yield watch
        except UserError as error:
            error.mine = watch.fail(Verdict(rank, "", error.code))
            tell(error)
            error.mine = False
            raise
        except (Exception, KeyboardInterrupt) as error:
            if _is_broken(error):
                raise watch.lost(error) from None
            watch.failure = "".join(traceback.format_exception(error))
            watch.fail(Verdict(rank, f"{name(rank)} has failed: {_short(error)}", 1))
            raise
        finally:
            try:
                close()
            finally:
                watch.leave()
        watch.raise_verdict()


class Watch:
    """One rank's part in the watch. ``where`` says which collective it is in, if it is known; ``progress`` changes as it moves."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, name: Callable[[int], str], keeper: int | None, pace: Pace
    ) -> None:
        self.rank, self.size, self.name, self.keeper, self.pace = rank, size, name, keeper, pace
        self.where: Callable[[], str | None] = lambda: None
        self.progress: Callable[[], int] = lambda: 0
        self.failure: str | None = None
        self._store = store
        self._place: str | None = None
        self._verdict: Verdict | None = None
        self._speaks = True
        self._decided, self._left, self._awake = threading.Event(), threading.Event(), threading.Event()
        self._rounds = 0
        self._neighbour = _Neighbour((rank + 1) % size)
        self._standstill = Standstill(rank, size, name, pace.still, pace.beat)
        self._threads: list[threading.Thread] = []
        self._process = this_process()

    def start(self) -> None:
        """Begin to beat; nothing to do in a world of one."""
        if self.size == 1:
            return
        self._store.set(f"{_KEYS}/process/{self.rank}", self._process)
        # A client of its own: the main thread may wait in its one for minutes.
        own_client = self._store.clone()  # type: ignore[attr-defined]
        beats = threading.Thread(target=self._beat, args=(own_client,), name="watch-beats", daemon=True)
        judge = threading.Thread(target=self._judge, name="watch-judge", daemon=True)
        self._threads = [beats, judge]
        for thread in self._threads:
            thread.start()

    def fail(self, verdict: Verdict) -> bool:
        """Tell the others why this rank ends. Returns whether it is the first to say so; False also where one was lost."""
        if self.size == 1:
            return True
        try:
            winner = publish(self._store, verdict)
        except dist.DistError:
            return True
        self._decide(winner)
        return winner == verdict

    def lost(self, error: BaseException) -> UserError:
        """What to raise for the broken collective ``error``; waits until it is known whom it was about."""
        self._place = self._in_words(error)
        # A dead rank on another machine is known by its silence alone.
        if not self._decided.wait(self.pace.silence + self.pace.grace if self.size > 1 else 0):
            text = f"{self.name(self.rank)} lost the connection to the others {self._place}: {_short(error)}{last_report(self._store)}"
            if self.fail(Verdict(self.rank, text, 1)):
                tell(RankLost(text, mine=True))
            return RankLost(text, mine=False)
        return self._ended()

    def raise_verdict(self) -> None:
        """Raise what the others have ended with, where this rank had come to its end without a fault."""
        if self._verdict is not None:
            raise self._ended()

    def _ended(self) -> UserError:
        assert self._verdict is not None
        if self._verdict.text:
            return RankLost(self._verdict.text, mine=False)  # the judge says it
        return UserError("another rank has told why the run ends", mine=False)

    @contextlib.contextmanager
    def sigterm_put_off(self) -> Iterator[None]:
        """Where nobody handles SIGTERM, end by it only after a moment without a verdict (or after its line)."""
        free = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if self.size == 1 or not free or threading.current_thread() is not threading.main_thread():
            yield
            return
        process = os.getpid()

        def end(number: int, _: FrameType | None) -> None:
            until = time.monotonic() + self.pace.grace
            while os.getpid() == process and self._verdict is None and time.monotonic() < until:
                time.sleep(self.pace.beat / 50)
            if self._verdict is None or os.getpid() != process:  # a forked child ends as it would without us
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        signal.signal(signal.SIGTERM, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def leave(self) -> None:
        """Say goodbye, so that nobody takes this rank for dead, and end the threads.

        The rank that keeps the store stays until the others have left too; after a verdict, until they can have read it.
        """
        if self.size == 1:
            return
        with contextlib.suppress(dist.DistError):
            self._store.set(f"{_KEYS}/left/{self.rank}", "")
            left = self._store.add(f"{_KEYS}/left", 1)
            until = float("inf")
            while self.keeper == self.rank and left < self.size and time.monotonic() < until:
                time.sleep(self.pace.beat / 50)
                if self._decided.is_set():
                    until = min(until, time.monotonic() + self.pace.grace)
                left = self._store.add(f"{_KEYS}/left", 0)
        self._left.set()
        self._awake.set()
        for thread in self._threads:
            thread.join(self.pace.grace)

    def _beat(self, store: dist.Store) -> None:
        try:
            while not self._decided.is_set():
                self._rounds += 1
                store.set(f"{_KEYS}/beat/{self.rank}", str(self._rounds))
                verdict = published(store)
                if verdict is None and (found := self._look(store)):
                    verdict = publish(store, found)
                if verdict is not None:
                    self._speaks = store.add(f"{_KEYS}/speakers", 1) <= _SPEAKERS
                    self._decide(verdict)
                elif line := self._standstill.look(store, self.progress(), self._in_words):
                    self._say(f"warning: {line}")
                if self._left.wait(self.pace.beat):
                    return
        except (RuntimeError, ValueError) as problem:
            if not self._left.is_set():
                self._decide(self._store_lost("is gone", problem))

    def _look(self, store: dist.Store) -> Verdict | None:
        """Look at the next rank in the ring that has not left."""
        other = self._neighbour
        if other.rank == self.rank:
            return None  # all others have left
        gone = other.process is not None and is_gone(
            other.process, self._process
        )  # asked before its last words are read
        if not store.check([f"{_KEYS}/beat/{other.rank}"]):
            return None  # has not come yet
        beat = store.get(f"{_KEYS}/beat/{other.rank}")
        if beat != other.beat and not gone:
            other.beat, other.silent = beat, 0
            if other.process is None:
                other.process = store.get(f"{_KEYS}/process/{other.rank}").decode()
            return None
        other.silent += 1
        if store.check([f"{_KEYS}/left/{other.rank}"]):
            self._neighbour = _Neighbour((other.rank + 1) % self.size)
            return None
        if gone or other.silent * self.pace.beat >= self.pace.silence:
            how = "has died" if gone else f"has died or cannot be reached (silent for {self.pace.silence:g} s)"
            return Verdict(other.rank, f"{self.name(other.rank)} on {host_of(other.process)} {how}", 1)
        return None

    def _store_lost(self, how: str, problem: object = "") -> Verdict:
        if self.keeper is None:
            return Verdict(None, f"the launcher has died or cannot be reached: its store {how}", 1)
        return Verdict(self.keeper, f"{self.name(self.keeper)} has died or cannot be reached: its store {how}", 1)

    def _decide(self, verdict: Verdict) -> None:
        if self._verdict is None:
            self._verdict = verdict
            self._decided.set()
            self._awake.set()

    def _judge(self) -> None:
        """End the process when it is time; talks to nobody, so that it cannot hang."""
        rounds, still = 0, 0
        while not self._left.is_set():
            self._awake.wait(self.pace.beat)
            if self._verdict is not None:
                return self._carry_out(self._verdict)
            still = 0 if self._rounds != rounds else still + 1
            rounds = self._rounds
            if still * self.pace.beat >= self.pace.silence:
                self._decide(self._store_lost(f"was silent for {self.pace.silence:g} s"))

    def _carry_out(self, verdict: Verdict) -> None:
        own = verdict.rank == self.rank
        if own and self.failure is None and verdict.text:
            self._say(
                f"error: this rank (rank {self.rank}) was taken for dead by the others, who have ended: {verdict.text}"
            )
        elif not own and verdict.text:
            self._say(f"error: {verdict.text}; this rank (rank {self.rank}) was {self._place or self._in_words()}")
        # Whoever failed itself has more to say and to close than those that can only end.
        if self._left.wait(self.pace.silence if own else self.pace.grace):
            return
        if self.failure:
            os.write(2, self.failure.encode())
        os._exit(verdict.code)

    def _say(self, line: str) -> None:
        if self._speaks:
            os.write(2, f"{line}\n".encode())  # not sys.stderr, whose lock a hanging thread may hold
        log = logging.getLogger(f"megatron_zebra.rank{self.rank}")
        if log.handlers:
            log.error(line.removeprefix("error: "))

    def _in_words(self, error: BaseException | None = None) -> str:
        if current := self.where():
            return f"in {current}"
        return whereabouts.of_error(error) if error else whereabouts.of_process()


@dataclass
class _Neighbour:
    """The rank that this one looks at, its last beat, and how often in a row it was the same."""

    rank: int
    beat: bytes | None = None
    silent: int = 0
    process: str | None = None


def _is_broken(error: BaseException) -> bool:
    """Whether ``error``, or what led to it, says that a collective or the store broke."""
    seen: list[BaseException] = []
    now: BaseException | None = error
    while now is not None and now not in seen:  # what led to it may lead back to it
        if isinstance(now, dist.DistError):
            return True
        if isinstance(now, RuntimeError) and any(word in str(now) for word in _BROKEN):
            return True
        seen.append(now)
        now = now.__cause__ or now.__context__
    return False


def _short(error: BaseException) -> str:
    """The kind of ``error`` and its first line that says something; torch's go on with C++ frames."""
    first = next(filter(None, map(str.strip, str(error).splitlines())), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
