"""Profiles and memory snapshots of chosen steps."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_zebra.config.sections import Training


class Diagnostics:
    """Told of each step's beginning and end; writes run_dir/profile and run_dir/memory for this rank."""

    def __init__(self, settings: Training, folder: Path, rank: int, device: torch.device) -> None:
        self.settings, self.folder, self.rank, self.device = settings, folder, rank, device
        self.profiler: profile | None = None
        self.first_profiled = self.step = 0

    def before(self, step: int) -> None:
        wanted, self.step = self.settings.profile_steps, step
        if wanted and self.profiler is None and wanted[0] <= step <= wanted[1]:  # also where a resumed run comes in
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
            self.profiler = profile(activities=activities, profile_memory=True, record_shapes=True)
            self.profiler.start()
            self.first_profiled = step
        if step in self.settings.memory_snapshot_steps and self.device.type == "cuda":
            torch.cuda.memory._record_memory_history()

    def after(self, step: int) -> None:
        wanted = self.settings.profile_steps
        if self.profiler is not None and wanted and step == min(wanted[1], self.settings.steps):
            self.close()
        if step in self.settings.memory_snapshot_steps:
            if self.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(self._file("memory", f"step-{step}", "pickle")))
                torch.cuda.memory._record_memory_history(enabled=None)
            else:
                self._file("memory", f"step-{step}", "txt").write_text(Path("/proc/self/status").read_text())

    def close(self) -> None:
        """Write the trace up to the step begun last, if one is being recorded: a process that ends within it would crash."""
        if self.profiler is None:
            return
        self.profiler.stop()
        trace = self._file("profile", f"steps-{self.first_profiled}-{self.step}", "json.gz")
        self.profiler.export_chrome_trace(str(trace))
        self.profiler = None

    def _file(self, kind: str, name: str, suffix: str) -> Path:
        (self.folder / kind).mkdir(exist_ok=True)
        return self.folder / kind / f"{name}-rank-{self.rank:05d}.{suffix}"
