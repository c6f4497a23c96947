"""Checkpoints: index.json, lists of pieces, data files; with checksums that tell of the damage, and with such that do not."""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megatron_zebra.checkpoint import catalog, files, layout
from megatron_zebra.checkpoint.collective import Alone
from megatron_zebra.checkpoint.describe import describe
from megatron_zebra.checkpoint.verify import find_latest_good, verify
from megatron_zebra.config.sections import Config
from megatron_zebra.convert.folder import architecture_of
from megatron_zebra.convert.inspection import describe as describe_model
from megatron_zebra.convert.source import open_model
from megatron_zebra.errors import UserError
from megatron_zebra.model.architecture import resolve
from megatron_zebra.model.lora import adapter_shapes
from megatron_zebra.model.trained import is_trained
from megatron_zebra.parallel.optimizer import KINDS, Held
from megatron_zebra.parallel.sharding import Box
from megatron_zebra.training.adopt import has_progress
from megatron_zebra.training.state import Progress, resume_state, state_of
from tests.checkpoint.cases import ThreadRank, run_ranks, saved
from tests.fuzzing.damage import damaged_bytes, damaged_tree, to_json
from tests.fuzzing.subject import Outcome, Trial

RANKS = 2
MODEL = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "ffn_hidden_size": 8, "vocab_size": 16}
CONFIGS = {
    "plain": Config.model_validate({"model": MODEL}),
    "adapters": Config.model_validate({"model": MODEL, "training": {"lora": {"rank": 2}}}),
}
ARCH = resolve(CONFIGS["plain"].model, 16, 64)


def prepare(folder: Path) -> Trial:
    """Two checkpoints of a run, by two ranks; the newer is damaged. A run of all weights, and one of adapters."""
    for name, config in CONFIGS.items():
        save_run(folder / name / "checkpoints", config, steps=(1, 2))
    sound = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    def trial(chance: random.Random) -> Outcome:
        with _without_waiting_for_the_disk():
            return try_one(chance)

    def try_one(chance: random.Random) -> Outcome:
        name = chance.choice([*CONFIGS])
        root, config = folder / name / "checkpoints", CONFIGS[name]
        newest = root / catalog.folder_name(2)
        for path, data in sound.items():
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)
        (newest / catalog.RETIRED).unlink(missing_ok=True)
        if chance.random() < 0.4:
            _damage_sealed(chance, newest)
            return _read_other(root, newest, config)
        file = newest / chance.choice(
            [layout.INDEX, layout.INDEX, "rank-00000.json", "rank-00001.json", "rank-00001.bin"]
        )
        if file.suffix == ".bin" or chance.random() < 0.5:
            file.write_bytes(damaged_bytes(chance, sound[file]))
        else:
            file.write_bytes(to_json(damaged_tree(chance, json.loads(sound[file]))))
        return _read(root, newest, config)

    return trial


def _without_waiting_for_the_disk() -> AbstractContextManager[Any]:
    return patch.multiple(files, sync=lambda file: None, sync_folder=lambda path: None)


class Optimizer:
    """What a checkpoint is written from and read into: half of every tensor, or (by one rank) all of it."""

    def __init__(self, config: Config, rank: int, ranks: int, step: int) -> None:
        self.parts = [*_held(config, rank, ranks, step)]

    def held(self) -> Iterator[Held]:
        yield from self.parts

    def updates(self) -> int:
        return 1

    def restored(self, updates: int) -> None:
        assert type(updates) is int, f"{updates!r} updates"


def _held(config: Config, rank: int, ranks: int, step: int) -> Iterator[Held]:
    shapes = ARCH.parameter_shapes() | adapter_shapes(ARCH, config.training.lora)
    for number, (name, shape) in enumerate(shapes.items()):
        size = torch.Size(shape).numel()
        first, last = size * rank // ranks, size * (rank + 1) // ranks
        kinds = KINDS if is_trained(name, config.training) else ("weight",)
        values = {kind: _values(size, step, number, place)[first:last] for place, kind in enumerate(kinds)}
        yield Held(name, shape, Box((0,) * len(shape), shape, shape), first, last - first, (0, 1), values)


def _values(size: int, step: int, number: int, place: int) -> torch.Tensor:
    """The content of a tensor at a step; nothing at step 0."""
    return (
        torch.randn(size, generator=torch.Generator().manual_seed(100 * number + 10 * place + step))
        if step
        else torch.zeros(size)
    )


def save_run(root: Path, config: Config, steps: Sequence[int]) -> list[Path]:
    """Checkpoints of ``steps`` under ``root``, by two ranks; their folders."""
    found = []
    for step in steps:
        progress = Progress(step, 8 * step, 64 * step, data=["data"], seed=1)

        def act(group: ThreadRank, progress: Progress = progress) -> Any:
            optimizer: Any = Optimizer(config, group.rank, RANKS, progress.step)
            return state_of(progress, config, ARCH, optimizer).save(root, config.checkpoint, group)

        with _without_waiting_for_the_disk():
            found.append(saved(run_ranks(RANKS, act)).folder)
    return found


def resumed(root: Path, config: Config) -> tuple[Progress | None, list[str], Optimizer]:
    """What a run of one rank would go on with."""
    empty: Any = Optimizer(config, 0, 1, 0)
    found = find_latest_good(root)
    return resume_state(root, found, config, ARCH, empty, Alone()), found.skipped, empty


def _read(root: Path, newest: Path, config: Config) -> Outcome:
    """Damage that the checksums tell of: what is read is what was written, or the older checkpoint."""
    problems = verify(newest)
    progress, notes, optimizer = resumed(root, config)
    assert progress is not None
    assert progress == Progress(progress.step, 8 * progress.step, 64 * progress.step, updates=1, data=["data"], seed=1)
    for part, wanted in zip(optimizer.parts, Optimizer(config, 0, 1, progress.step).parts):
        for kind, values in part.tensors.items():
            assert torch.equal(values, wanted.tensors[kind]), f"{part.name} ({kind}) is not what was saved"
    assert (progress.step == 2) == (not problems), f"step {progress.step} was resumed over {problems}"
    if problems:
        assert len(notes) == 1
        raise UserError("\nerror: ".join([*problems, notes[0].replace("step-00000002 skipped: ", "")]))
    return "same"


def _damage_sealed(chance: random.Random, folder: Path) -> None:
    """Damage with checksums made anew, as by a foreign program: index, one of the lists, or both."""
    index = json.loads((folder / layout.INDEX).read_bytes())
    del index["checksum"]
    if chance.random() < 0.6:
        number = chance.randrange(RANKS)
        file, entry = folder / f"{layout.rank_stem(number)}.json", index["ranks"][number]
        data = to_json(damaged_tree(chance, json.loads(file.read_bytes())))
        file.write_bytes(data)
        entry |= {"pieces_size": len(data), "pieces_checksum": layout.checksum(data)}
    else:
        index["metadata" if chance.random() < 0.6 else "ranks"] = None
        whole = json.loads((folder / layout.INDEX).read_bytes())
        part = "metadata" if index["metadata"] is None else "ranks"
        index[part] = damaged_tree(chance, whole[part])
    text = to_json(index)
    try:
        plain = json.loads(text)
        sealed = {**plain, "checksum": layout.checksum(layout._canonical(plain))}
        (folder / layout.INDEX).write_text(json.dumps(sealed))
    except (ValueError, RecursionError, UserError):  # no JSON at all
        (folder / layout.INDEX).write_bytes(text)


def _read_other(root: Path, newest: Path, config: Config) -> Outcome:
    """Damage that no checksum tells of: sound in itself, or refused."""
    problems = verify(newest)
    if not problems:
        assert describe(newest)["folder"] == str(newest)
        assert architecture_of(newest).parameter_shapes()
        assert isinstance(has_progress(newest), bool)
        assert describe_model(newest)
        model = open_model(newest)
        for name in model.names():
            model.read_tensor(name)
    progress, notes, _ = resumed(root, config)
    assert progress is not None
    for name, value in vars(progress).items():
        assert type(value) is type(getattr(Progress(), name)), f"progress.{name} = {value!r}"
    if problems:
        assert progress.step == 1
        raise UserError("\nerror: ".join([*problems, *notes]))
    return "other"
