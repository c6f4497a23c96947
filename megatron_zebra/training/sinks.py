"""Where the records of a run go, from the main rank."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_zebra.config.sections import Config
from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.loss import Evaluated
from megatron_zebra.training.loggers import Logger, open_loggers
from megatron_zebra.training.metrics import MetricsFile, Record
from megatron_zebra.training.run_folder import writing


class Sinks:
    """Where records go: metrics.jsonl, evaluation.jsonl and the optional loggers, all on the main rank."""

    def __init__(self, config: Config, folder: Path, restored_step: int, enabled: bool) -> None:
        self.outputs: list[Logger] = []
        self.evaluations: MetricsFile | None = None
        if enabled:
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

    def write(self, record: Record) -> None:
        with _telling(record):
            for output in self.outputs:
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
        with _telling(record):
            self.evaluations.write(record)


@contextlib.contextmanager
def _telling(record: Record) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"metrics of step {record['step']} cannot be written: {error.strerror}") from None
