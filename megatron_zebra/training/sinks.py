"""Where the records of a run go, from the main rank."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_zebra.checkpoint.files import AWAY, NO_ROOM
from megatron_zebra.config.sections import Config
from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.loss import Evaluated
from megatron_zebra.training.loggers import Logger, open_loggers
from megatron_zebra.training.metrics import MetricsFile, Record
from megatron_zebra.training.run_folder import put_by, writing


class Sinks:
    """Where records go: metrics.jsonl, evaluation.jsonl and the optional loggers, all on the main rank."""

    def __init__(
        self, config: Config, folder: Path, restored_step: int, enabled: bool, say: Callable[[str], None]
    ) -> None:
        """``say``: for what goes wrong and need not end the run."""
        self._say = say
        self._behind: set[object] = set()
        self.outputs: list[Logger] = []
        self.evaluations: MetricsFile | None = None
        if enabled:
            if not restored_step:
                self._put_by(folder / "metrics.jsonl")
                self._put_by(folder / "evaluation.jsonl")
            with writing(folder / "metrics.jsonl"):
                metrics = MetricsFile(folder / "metrics.jsonl", restored_step)
            with writing(folder / "evaluation.jsonl"):
                self.evaluations = MetricsFile(folder / "evaluation.jsonl", restored_step)
            self.outputs = [metrics, *open_loggers(config, folder, restored_step)]

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, *_: object) -> None:
        for output in self.outputs:
            output.close()
        if self.evaluations is not None:
            self.evaluations.close()

    def _put_by(self, file: Path) -> None:
        """A run that begins anew where another was overwrites nothing: its checkpoints may only be away."""
        with writing(file):
            if file.exists() and file.stat().st_size:
                self._say(f"warning: {file} is of a run that has no checkpoint here: kept as {put_by(file).name}")

    def write(self, record: Record) -> None:
        for output in self.outputs:
            with self._telling(output, record):
                output.write(record)

    def write_evaluation(self, step: int, results: dict[str, Evaluated]) -> None:
        """By position, as tools/evaluate.py writes it: the numbers of metrics.jsonl know no bins."""
        if self.evaluations is None:
            return
        sets = {
            name: {"loss": result.loss, "edges": result.edges, "loss_by_position": result.by_position()}
            for name, result in results.items()
        }
        record: Record = {"step": step, "sets": sets}
        with self._telling(self.evaluations, record):
            self.evaluations.write(record)

    @contextlib.contextmanager
    def _telling(self, output: object, record: Record) -> Iterator[None]:
        """A full or failing disk is a warning, once until it takes them again: what it does not take is kept, and written later."""
        try:
            yield
        except OSError as error:
            if error.errno not in NO_ROOM + AWAY:
                raise UserError(f"metrics of step {record['step']} cannot be written: {error.strerror}") from None
            if not self._behind:
                self._say(
                    f"warning: metrics from step {record['step']} on are kept until the disk takes them: {error.strerror}"
                )
            self._behind.add(output)
        else:
            self._behind.discard(output)
