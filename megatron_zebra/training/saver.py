"""Saving during training: beside it, within a budget of time, with a second home if one is given."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_zebra.checkpoint import catalog
from megatron_zebra.checkpoint.background import Background, HostCopies
from megatron_zebra.checkpoint.collective import Collective
from megatron_zebra.checkpoint.errors import CheckpointError, NotTaken
from megatron_zebra.checkpoint.mirror import Mirror
from megatron_zebra.checkpoint.save import Saved
from megatron_zebra.config.sections import Config
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.optimizer import ShardedOptimizer
from megatron_zebra.parallel.process import WorldCollective
from megatron_zebra.training.console import Console
from megatron_zebra.training.state import Progress, State, held_pieces, state_of

PATIENCE = 60.0  # seconds


class Saver:
    """The saves of one run; every rank calls the same, in the same order."""

    def __init__(
        self,
        config: Config,
        arch: Architecture,
        folder: Path,
        optimizer: ShardedOptimizer,
        grid: Grid,
        console: Console,
    ) -> None:
        self.config, self.arch, self.optimizer, self.console = config, arch, optimizer, console
        self.settings, self.root = config.checkpoint, folder / "checkpoints"
        self.mirror = Mirror(self.settings.mirror) if self.settings.mirror else None
        self.collective = WorldCollective(grid)
        self.aside = WorldCollective(grid, aside=True) if self.settings.background else self.collective
        self.copies = HostCopies()
        if self.settings.background and 0 < self.settings.interval < config.training.steps:
            self.copies.set_aside(held_pieces(optimizer))
        self.running: Background[Saved] = Background()
        self.saving = 0  # the step that is being saved
        self.waited = 0.0
        self._since, self._warned = time.monotonic(), False

    def due(self, step: int) -> bool:
        return self.settings.interval > 0 and step % self.settings.interval == 0

    def save(self, progress: Progress, last: bool) -> None:
        """Save, after the end of the save before. Where nothing comes ``last``, this waits to the end.

        Raises:
            NotTaken: in the last one; before it that is a warning, since a later save may find it mended.
        """
        began = time.monotonic()
        self.tell(None)
        state = state_of(progress, self.config, self.arch, self.optimizer)
        self.saving = state.step
        if self.settings.background and not last:
            state = replace(state, pieces=self.copies.of(state.pieces))
            self.running.start(lambda: self._write(state, self.aside))
        else:
            self._report(lambda: self._write(state, self.collective), last)
        self._budget(began, last)

    def tell(self, wait: float | None = 0) -> None:
        """Say how the save beside the training ended, if it has within ``wait`` seconds (None: however long it takes)."""
        self._report(lambda: self.running.take(wait), last=False)

    def failing(self) -> None:
        """Let a save that is under way come to its end, though training has failed; not for long, as others may hang."""
        try:
            self.tell(PATIENCE)
        except Exception as error:
            self.console.say(f"warning: step {self.saving} was not saved: {error}")
        if self.running.busy:
            self.console.say(f"warning: step {self.saving} was not saved: not within {PATIENCE:g} s of the failure")

    def has_saved(self) -> bool:
        """Whether the run has a checkpoint of its own; called by all ranks."""
        return bool(self.collective.all_gather(catalog.newest(self.root) is not None)[0])

    def take_waited(self) -> float:
        """Seconds that training waited for saves since this was asked last."""
        waited, self.waited = self.waited, 0.0
        return waited

    def _write(self, state: State, collective: Collective) -> Saved:
        saved = state.save(self.root, self.settings, collective)
        if self.mirror is None:
            return saved
        try:
            self.mirror.upload(saved.folder, collective, self.settings.keep_last, self.settings.keep_every)
        except CheckpointError as error:
            return replace(saved, warning="; ".join(filter(None, [saved.warning, str(error)])))
        return saved

    def _report(self, act: Callable[[], Saved | None], last: bool) -> None:
        try:
            saved = act()
        except NotTaken as error:
            if last:
                raise
            self.console.say(f"warning: step {self.saving} was not saved: {error}")
            return
        if saved is not None:
            self.console.say(f"saved {saved}")

    def _budget(self, began: float, last: bool) -> None:
        """Count what training waited, and warn once where that is too much of the time since the save before."""
        now = time.monotonic()
        waited, since = now - began, now - self._since
        self.waited += waited
        self._since = now
        share, budget = waited / since, self.settings.time_budget
        if share > budget and not last and not self._warned:
            self._warned = True
            longer = math.ceil(self.settings.interval * share * (1 - budget) / (budget * (1 - share) + 1e-9))
            self.console.say(
                f"warning: training waited {waited:.2f} s for the save of step {self.saving}, {share:.0%} of the time since the one "
                f"before (checkpoint.time_budget = {budget:g}); checkpoint.interval = {longer} would keep to it"
            )
