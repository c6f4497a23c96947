"""The training run from beginning to end."""

import contextlib
import os
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_zebra.config.sections import Config
from megatron_zebra.data.batch import BatchLoader
from megatron_zebra.errors import UserError
from megatron_zebra.evaluation.loss import Evaluated, evaluate
from megatron_zebra.evaluation.subject import Subject
from megatron_zebra.model.architecture import Architecture
from megatron_zebra.parallel.grid import Grid
from megatron_zebra.parallel.process import WorldCollective, rank_name, sum_over
from megatron_zebra.parallel.replicas import differing
from megatron_zebra.planning.devices import peak_flops
from megatron_zebra.planning.flops import CONVENTION, StepFlops
from megatron_zebra.report.plots import write_plots
from megatron_zebra.training.build import Trained, build_training
from megatron_zebra.training.console import Console
from megatron_zebra.training.diagnose import Diagnostics
from megatron_zebra.training.inputs import Inputs
from megatron_zebra.training.metrics import Record
from megatron_zebra.training.run_folder import rank_log, write_description
from megatron_zebra.training.saver import Saver
from megatron_zebra.training.schedule import global_batch_size, learning_rate
from megatron_zebra.training.signals import stop_signals
from megatron_zebra.training.sinks import Sinks
from megatron_zebra.training.slow import SlowRanks
from megatron_zebra.training.spike import Usual
from megatron_zebra.training.start import start
from megatron_zebra.training.state import Progress
from megatron_zebra.training.step import StepOutcome, train_step
from megatron_zebra.training.tasks import Planned, run_task

MOST_RETURNS = 3  # to one checkpoint


def train(config: Config, arch: Architecture, inputs: Inputs, folder: Path, grid: Grid) -> None:
    """Train, resuming what ``folder`` holds, until ``training.steps`` or a SIGTERM.

    Raises:
        UserError: what stands in the way is the user's to mend.
    """
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch insists on it for CUDA
    torch.use_deterministic_algorithms(config.training.deterministic)
    log = rank_log(folder, grid.rank)
    log.info("rank %d of %d on %s", grid.rank, grid.world_size, grid.device)
    log.info("flops_per_second and mfu count %s", CONVENTION)
    trained = build_training(config, arch, grid)
    collective = WorldCollective(grid)
    progress, notes = start(config, arch, inputs, folder, trained.optimizer, collective)
    if grid.is_main:  # not before: what cannot go on here leaves the folder as it was
        write_description(folder, config, grid.world_size, arch.vocab_size)
    console = Console(grid.is_main, config.training.steps, progress.step, config.logging.interval)
    saver = Saver(config, arch, folder, trained.optimizer, grid, console)
    returns: Counter[int] = Counter()
    with stop_signals(grid.world_size == 1) as stop_wanted:
        while True:
            for note in [*inputs.warnings, *notes]:
                log.info(note)
                console.say(note)
            try:
                with Sinks(config, folder, progress.step, grid.is_main, console.say) as sinks:
                    run = _Run(config, arch, inputs, folder, grid, trained, console, saver, sinks)
                    run.until_done(progress, stop_wanted)
                break
            except _Rewind as spike:
                rows = spike.consumed_rows
                console.say(str(spike))
            except BaseException:
                saver.failing()
                raise
            progress, notes = start(config, arch, inputs, folder, trained.optimizer, collective)
            notes = [*notes, f"rows {progress.consumed_rows} to {rows} are left out"]
            progress = replace(progress, consumed_rows=rows)
            returns[progress.step] += 1
            if returns[progress.step] > MOST_RETURNS:
                raise UserError(
                    f"the loss was a spike each time after {MOST_RETURNS} returns to step {progress.step} with other data "
                    "(training.spike); its cause is not the data"
                )
    console.close()
    if grid.is_main and (folder / "metrics.jsonl").stat().st_size:
        try:
            write_plots(folder)
        except (UserError, OSError) as error:  # the run is done and saved: no picture is no failure
            console.say(f"warning: no plots: {error}")
    log.info("done")


class _Rewind(Exception):
    """The loss was a spike, and training is to go back to the newest checkpoint; ``consumed_rows`` with the step's own."""

    def __init__(self, text: str, consumed_rows: int) -> None:
        super().__init__(text)
        self.consumed_rows = consumed_rows


class _Run:
    """What stays the same from step to step."""

    def __init__(
        self,
        config: Config,
        arch: Architecture,
        inputs: Inputs,
        folder: Path,
        grid: Grid,
        trained: Trained,
        console: Console,
        saver: Saver,
        sinks: Sinks,
    ) -> None:
        self.config, self.arch, self.inputs, self.folder, self.grid = config, arch, inputs, folder, grid
        self.trained, self.console, self.saver, self.sinks = trained, console, saver, sinks
        self.flops = StepFlops(arch)
        self.peak = _peak(config, grid.device)
        self.subject = Subject(arch, grid, trained.runner, trained.context, trained.decoder)
        self.slow = SlowRanks(lambda rank: rank_name(grid.layout, rank))
        self.diagnostics = Diagnostics(config.training, folder, grid.rank, grid.device)

    def until_done(self, progress: Progress, stop_wanted: Callable[[], bool]) -> None:
        config, steps = self.config, self.config.training.steps
        if progress.step >= steps:
            self.console.say(f"nothing to do: {self.folder} is at step {progress.step} of training.steps = {steps}")
            return
        skipped, stopped, accept = 0, False, None
        with contextlib.closing(self.diagnostics), self._loader(progress) as loader:
            while progress.step < steps and not stopped:
                began = time.monotonic()
                self.diagnostics.before(progress.step + 1)
                batch = self._next(loader)
                data_time = time.monotonic() - began
                rate = learning_rate(
                    config.optimizer, progress.step - progress.schedule_start, steps - progress.schedule_start
                )
                self.grid.traffic.reset()
                if config.training.spike.threshold:
                    accept = partial(self._is_usual, progress.usual)
                outcome = train_step(
                    self.trained,
                    batch.micro_batches,
                    rate,
                    self.grid,
                    len(self.inputs.source_names),
                    self.flops,
                    stop_wanted,
                    accept,
                    data_time,
                )
                stopped = outcome.stop_wanted
                skipped = 0 if outcome.result.applied else skipped + 1
                before, progress = progress, self._after(progress, outcome, batch.global_batch_size)
                if not outcome.accepted:
                    self._spike(before, progress, outcome.loss)
                record = self._record(progress, outcome, rate, time.monotonic() - began, data_time)
                record["sequence_length"], record["global_batch_size"] = batch.sequence_length, batch.global_batch_size
                self.diagnostics.after(progress.step)
                final = progress.step == steps
                if final or not stopped:  # whoever sent the signal may wait for the save alone
                    stopped = self._judge(record, final, stop_wanted) or stopped
                self.sinks.write(record)
                self.console.step(record)
                if skipped >= config.training.max_nonfinite_steps:
                    why = "a spike (training.spike.threshold)" if not outcome.accepted else "not finite"
                    raise UserError(
                        f"the loss or the gradient was {why} {skipped} steps in a row (training.max_nonfinite_steps), up to step "
                        f"{progress.step}; checkpoints of {self.folder} are as they were"
                    )
                self._compare_replicas(progress.step)
                self._report_slow(progress.step, outcome)
                self.saver.tell()
                if final or stopped or self.saver.due(progress.step):
                    self.saver.save(progress, final or stopped)
        if stopped and progress.step < steps:
            self.console.say(f"stopped by a signal after step {progress.step}; the same command resumes from there")

    def _after(self, progress: Progress, outcome: StepOutcome, rows: int) -> Progress:
        usual = progress.usual
        return replace(
            progress,
            step=progress.step + 1,
            consumed_rows=progress.consumed_rows + rows,
            consumed_tokens=progress.consumed_tokens + outcome.tokens,
            skipped_steps=progress.skipped_steps + (not outcome.result.applied),
            usual=usual.after(outcome.loss, self.config.training.spike.window) if outcome.accepted else usual,
        )

    def _is_usual(self, usual: Usual, loss: float) -> bool:
        spike = self.config.training.spike
        return usual.deviations(loss, spike.window) < spike.threshold

    def _spike(self, before: Progress, after: Progress, loss: float) -> None:
        """The update was left out already; go back, if that is wanted and possible."""
        spike, usual = self.config.training.spike, before.usual
        text = (
            f"loss spike at step {after.step}: {loss:.4f} is {usual.deviations(loss, spike.window):.1f} standard deviations above "
            f"{usual.mean:.4f}"
        )
        if spike.action == "rewind":
            self.saver.tell(None)
            if self.saver.has_saved():
                raise _Rewind(f"{text}; back to the newest checkpoint", after.consumed_rows)
            text += " and there is no checkpoint yet"
        self.console.say(f"{text}; its update is left out")

    def _compare_replicas(self, step: int) -> None:
        interval = self.config.training.compare_replicas
        if not _due(interval, step, False):
            return
        if found := differing(self.trained.optimizer.module, self.grid):
            raise UserError(
                f"step {step}: {found} (training.compare_replicas): a device or its memory is faulty; checkpoints after step "
                f"{step - interval} may have it, so set those aside, in checkpoint.mirror too, before the run goes on"
            )

    def _report_slow(self, step: int, outcome: StepOutcome) -> None:
        self.slow.add(outcome.own_times)
        if step % self.config.logging.interval == 0 and (line := self.slow.report()):
            self.console.say(line)

    def _loader(self, progress: Progress) -> BatchLoader:
        return BatchLoader(
            self.inputs.train,
            lambda step: global_batch_size(self.config, step),
            self.config.training.micro_batch_size,
            dp_rank=self.grid.dp_rank,
            dp_size=self.grid.dp_size,
            step=progress.step,
            consumed_rows=progress.consumed_rows,
            stop=self.config.training.steps,
        )

    def _next(self, loader: BatchLoader) -> Any:
        try:
            return next(loader)
        except UserError as error:
            # Only this rank read these rows, so only it can tell.
            raise UserError(f"rank {self.grid.rank}: {error}") from None

    def _record(
        self, progress: Progress, outcome: StepOutcome, rate: float, seconds: float, data_time: float
    ) -> Record:
        flops_per_second = outcome.flops / seconds
        record = {
            "step": progress.step,
            "loss": outcome.loss,
            "grad_norm": outcome.result.norm,
            "learning_rate": rate,
            "tokens_per_second": outcome.tokens / seconds,
            "consumed_tokens": progress.consumed_tokens,
            "consumed_rows": progress.consumed_rows,
            "targets": outcome.targets,
            "skipped_steps": progress.skipped_steps,
            "flops_per_second": flops_per_second,
            "mfu": flops_per_second / self.peak / self.grid.world_size if self.peak else None,
            "step_time": seconds,
            "data_time": data_time,
            "save_time": self.saver.take_waited(),
            "compute_time": outcome.compute_time,
            "optimizer_time": outcome.optimizer_time,
            "exchange_time": self.grid.traffic.seconds,
            "communication_bytes": sum(self.grid.traffic.bytes.values()),
            "peak_memory_bytes": peak_memory(self.grid.device),
        }
        if self.config.training.distill.teacher is not None:
            record["distill_loss"] = outcome.distill_loss
        record |= {f"communication_bytes/{name}": count for name, count in sorted(self.grid.traffic.bytes.items())}
        if len(self.inputs.source_names) > 1:
            record |= {f"loss/{self.inputs.source_names[i]}": loss for i, loss in outcome.source_losses.items()}
        return record

    def _judge(self, record: Record, final: bool, stop_wanted: Callable[[], bool]) -> bool:
        """All that is due, or before the ``final`` step until a signal comes to any rank; whether one has."""
        due: list[Callable[[Record], None]] = []
        if self.inputs.valid and _due(self.config.evaluation.interval, record["step"], final):
            due.append(self._validate)
        for task in self.inputs.tasks:
            if _due(task.interval, record["step"], final):
                due.append(partial(self._run_task, task))
        for judge in due:
            judge(record)
            if not final and sum_over([float(stop_wanted())], self.grid.device)[0]:
                return True
        return False

    def _run_task(self, task: Planned, record: Record) -> None:
        self.console.say(run_task(task, self.subject, self.folder, record))

    def _validate(self, record: Record) -> None:
        results: dict[str, Evaluated] = {}
        for name, rows in self.inputs.valid.items():
            results[name] = evaluate(
                self.trained.runner,
                rows,
                self.config.training.micro_batch_size,
                self.grid,
                self.trained.context,
            )
            record[f"valid/{name}"] = results[name].loss
        self.sinks.write_evaluation(record["step"], results)
        losses = "  ".join(f"{name} {result.loss:.4f}" for name, result in results.items())
        self.console.say(f"validation at step {record['step']}: {losses}")


def _due(interval: int, step: int, last: bool) -> bool:
    return interval > 0 and (step % interval == 0 or last)


def _peak(config: Config, device: torch.device) -> float | None:
    """Peak FLOP/s of one device for MFU; None = not known."""
    if config.logging.peak_tflops is not None:
        return config.logging.peak_tflops * 1e12
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """Most memory this process has held so far, in bytes: device memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
