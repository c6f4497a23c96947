"""The report: one HTML page that opens from disk, with the charts' library inside."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from megatron_zebra.config.load import to_yaml
from megatron_zebra.planning.memory import memory_by_rank
from megatron_zebra.planning.parameters import parameter_count, trained_count
from megatron_zebra.report.charts import COLOURS, Chart
from megatron_zebra.report.folder import Run
from megatron_zebra.report.sections import sections

UNKNOWN = "–"


def write_report(runs: Sequence[Run], file: Path) -> None:
    """Write the page whole or not at all; OSError if it cannot be written."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(page(runs), encoding="utf-8", errors="replace")  # names may be no Unicode
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def page(runs: Sequence[Run]) -> str:
    """The HTML."""
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_asset("page.html"))
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(runs))]
    return template.render(
        title=", ".join(str(run.folder) for run in runs),
        runs=[{"run": run, "colour": colour, "yaml": to_yaml(run.config)} for run, colour in zip(runs, colours)],
        facts=facts(runs),
        differences=differences(runs),
        sections=sections(runs),
        size=_bytes,
        figure=_figure,
        style=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        plotly=Markup(get_plotlyjs()),
    )


def facts(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The table at the top: name of the row -> a cell a run."""
    columns = [_facts(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name, UNKNOWN) for column in columns] for name in names}


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Keys of the configurations that are not the same in all runs -> a cell a run."""
    flat = [_flat(run.config.model_dump(mode="json")) for run in runs]
    names = dict.fromkeys(name for values in flat for name in values if name != "logging.run_dir")
    found = {name: [_value(values.get(name, UNKNOWN)) for values in flat] for name in names}
    return {name: cells for name, cells in found.items() if len(set(cells)) > 1}


def _facts(run: Run) -> dict[str, str]:
    config, arch, metrics = run.config, run.arch, run.metrics
    parallel, training = config.parallel, config.training
    kinds = arch.layer_kinds
    found = {"steps": f"{int(metrics.steps[-1]):,} of {training.steps:,}"}
    found["tokens"] = _last(run, "consumed_tokens", "{:,.0f}")
    found["time in steps"] = _time(float(np.nansum(metrics.column("step_time"))))
    found["last training loss"] = _last(run, "loss", "{:.4f}")
    found |= {f"held out: {name}": f"{losses[-1]:.4f}" for name, (_, losses) in metrics.validation.items()}
    found["layers"] = f"{len(kinds)}: {kinds.count('global')} global, {kinds.count('local')} local"
    found["window"] = f"{arch.window_size:,}" if "local" in kinds else UNKNOWN
    if run.vocabulary:
        total, trained = parameter_count(arch), trained_count(arch, training)
        found["parameters"] = f"{total:,}" + (f", {trained:,} trained" if trained != total else "")
        found["vocabulary"] = f"{arch.vocab_size:,}"
    found["sequence length"] = f"{config.data.sequence_length:,}"
    found["rows a step"] = f"{training.global_batch_size:,}"
    found["precision"] = training.precision
    if run.layout is not None:
        layout = run.layout
        found["processes"] = f"{layout.world_size}: dp {layout.dp}, cp {layout.cp}, pp {layout.pp}, tp {layout.tp}"
    found["ZeRO stage"] = str(config.optimizer.zero_stage)
    found["tokens/s, median"] = _median(metrics.column("tokens_per_second"))
    found["peak memory, main process"] = _bytes(np.nanmax(metrics.column("peak_memory_bytes"), initial=0))
    if run.layout is not None and run.vocabulary and training.distill.teacher is None:
        on_cpu = parallel.device == "cpu"
        planned = memory_by_rank(arch, config, run.layout, run.stages, on_cpu)
        found["planned memory, fullest rank"] = _bytes(max(memory.total for memory in planned))
    found["skipped steps"] = _last(run, "skipped_steps", "{:.0f}")
    return found


def _figure(chart: Chart) -> Markup:
    """A figure for a script element; plotly escapes what could end it."""
    return Markup(to_json_plotly(chart.figure))


def _asset(name: str) -> str:
    return resources.files("megatron_zebra.report").joinpath(name).read_text(encoding="utf-8")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def _value(value: Any) -> str:
    """As YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _last(run: Run, column: str, form: str) -> str:
    values = run.metrics.column(column)
    values = values[np.isfinite(values)]
    return form.format(values[-1]) if len(values) else UNKNOWN


def _median(values: Any) -> str:
    return f"{np.nanmedian(values):,.0f}" if np.isfinite(values).any() else UNKNOWN


def _bytes(count: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 2**10:,.1f} KiB" if count else UNKNOWN


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
