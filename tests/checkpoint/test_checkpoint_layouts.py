"""Write under one layout, read under another: every value exact, and little more read than needed."""

import tempfile
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_zebra.checkpoint import (
    IncompleteCheckpoint,
    PieceKey,
    commit,
    compare_model,
    describe,
    open_checkpoint,
    verify,
    write_pieces,
)
from megatron_zebra.checkpoint.writer import as_bytes
from tests.checkpoint.cases import expected_shapes, save_step, saved, shares, state

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
SHAPES = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple)


@st.composite
def cuts(draw, shape, most=3):
    """Boxes cut along dimension 0 or 1 (uneven), each cut into flat intervals: the pieces of one layout."""
    axis = draw(st.integers(0, 1)) if len(shape) > 1 else 0
    edges = [0, shape[axis]] if shape else [0, 1]
    if shape:
        edges = sorted({*edges, *draw(st.sets(st.integers(0, shape[axis]), max_size=most))})
    boxes = []
    for a, b in pairwise(edges):
        offsets, local = [0] * len(shape), list(shape)
        if shape:
            offsets[axis], local[axis] = a, b - a
        flats = sorted({0, prod(local), *draw(st.sets(st.integers(0, prod(local)), max_size=most))})
        boxes += [(tuple(offsets), tuple(local), x, y - x) for x, y in pairwise(flats)]
    return boxes


@st.composite
def plans(draw):
    """[(shape, dtype, writer's cuts, rank of each cut, reader's cuts)]."""
    tensors = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(SHAPES)
        writer = draw(cuts(shape))
        ranks = [draw(st.integers(0, 3)) for _ in writer]
        tensors.append((shape, draw(st.sampled_from(DTYPES)), writer, ranks, draw(cuts(shape))))
    return tensors


def values(shape, dtype, seed):
    bits = np.random.default_rng(seed).integers(0, 255, size=(prod(shape), dtype.itemsize), dtype=np.uint8)
    if dtype == torch.bool:
        bits &= 1
    return torch.from_numpy(bits.reshape(-1)).view(dtype).reshape(shape)


def same(a, b):
    return as_bytes(a)[0].tobytes() == as_bytes(b)[0].tobytes()


def box_of(tensor, cut):
    offsets, local, start, numel = cut
    box = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, local))]
    return box.reshape(-1)[start : start + numel]


@given(plans(), st.sampled_from((1, 8, 64, 4096)), st.booleans())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_layout_reads_what_any_other_wrote(plan, block_bytes, check):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "step-00000001"
        tensors = {f"t{i}": values(shape, dtype, i) for i, (shape, dtype, *_) in enumerate(plan)}
        entries = []
        for rank in range(4):
            owned = [
                (PieceKey(f"t{i}", "weight", shape, *cut), box_of(tensors[f"t{i}"], cut))
                for i, (shape, _, writer, ranks, _) in enumerate(plan)
                for cut, owner in zip(writer, ranks)
                if owner == rank
            ]
            entries.append(write_pieces(folder, rank, iter(owned), block_bytes=block_bytes).entry)
        commit(folder, 1, {}, entries, {(n, "weight"): tuple(t.shape) for n, t in tensors.items()})
        checkpoint = open_checkpoint(folder, check=check)
        for i, (_, dtype, _, _, reader) in enumerate(plan):
            parts = []
            for cut in reader:
                offsets, local, start, numel = cut
                part = checkpoint.read_tensor(
                    f"t{i}", offsets=offsets, local_shape=local, flat_start=start, flat_numel=numel
                )
                assert part.dtype == dtype
                assert same(part, box_of(tensors[f"t{i}"], cut))
                parts.append(part)
            assert same(checkpoint.read_tensor(f"t{i}"), tensors[f"t{i}"].reshape(-1))
        assert verify(folder) == []


def whole(folder, tensor, block_bytes):
    """One tensor, in one piece."""
    entry = write_pieces(folder, 0, [(PieceKey.whole("w", "weight", tensor.shape), tensor)], block_bytes=block_bytes)
    commit(folder, 0, {}, [entry.entry])


def test_bytes_read_are_close_to_the_bytes_needed(tmp_path):
    block, tensor = 1024, np.random.default_rng(0).standard_normal((64, 16384)).astype(np.float32)  # 64 KiB a row
    whole(tmp_path / "a", tensor, block)
    for check, slack in ((True, block), (False, 0)):
        interval = open_checkpoint(tmp_path / "a", check=check)
        np.testing.assert_array_equal(
            interval.read("w", flat_start=5000, flat_numel=99_999), tensor.ravel()[5000:104_999]
        )
        assert 4 * 99_999 <= interval.bytes_read <= 4 * 99_999 + 2 * slack
        columns = open_checkpoint(tmp_path / "a", check=check)
        part = columns.read("w", offsets=(0, 4000), local_shape=(64, 4096))
        np.testing.assert_array_equal(part, tensor[:, 4000:8096].ravel())
        assert part.nbytes <= columns.bytes_read <= part.nbytes + 2 * 64 * slack


def test_a_strided_read_of_short_rows_reads_each_block_about_once(tmp_path):
    tensor = np.random.default_rng(0).standard_normal((4096, 1024)).astype(np.float32)  # 16 MiB, 4 KiB a row
    whole(tmp_path / "a", tensor, 128 * 1024)
    checkpoint = open_checkpoint(tmp_path / "a")
    part = checkpoint.read("w", offsets=(0, 256), local_shape=(4096, 256), flat_start=1000, flat_numel=900_000)
    np.testing.assert_array_equal(part, tensor[:, 256:512].ravel()[1000:901_000])
    assert checkpoint.bytes_read < 1.1 * tensor.nbytes


def test_all_ranks_save_and_the_metadata_come_back(tmp_path):
    result = saved(save_step(tmp_path, 12, world_size=3))
    assert result.folder == tmp_path / "step-00000012"
    assert (tmp_path / "latest").read_text() == "step-00000012\n"
    assert "MB/s" in str(result)
    checkpoint = open_checkpoint(result.folder)
    assert (checkpoint.step, checkpoint.world_size, checkpoint.metadata) == (12, 3, {"content": 12})
    assert [checkpoint.rank_metadata(r) for r in range(4)] == [{"rank": 0}, {"rank": 1}, {"rank": 2}, {}]
    assert checkpoint.tensors() == expected_shapes()
    assert checkpoint.kinds() == ["exp_avg", "exp_avg_sq", "weight"]
    with pytest.raises(IncompleteCheckpoint, match=r"holds no tensor nothing \(weight\)"):
        checkpoint.read("nothing")
    with pytest.raises(ValueError, match="leaves the tensor"):
        checkpoint.read("final_norm.weight", offsets=(3,), local_shape=(4,))
    with pytest.raises(ValueError, match="leaves its box"):
        checkpoint.read("final_norm.weight", flat_start=4, flat_numel=3)


def test_metadata_survive_keys_and_values_that_json_spells_differently(tmp_path):
    entry = write_pieces(tmp_path / "a", 0, [(PieceKey.whole("w", "weight", ()), np.float32(3))]).entry
    commit(tmp_path / "a", 5, {"order": {10: 1, 9: 2}, "betas": (0.9, 0.999), "x": 0.1 + 0.2, "text": "é\n"}, [entry])
    checkpoint = open_checkpoint(tmp_path / "a")
    assert checkpoint.metadata == {"order": {"10": 1, "9": 2}, "betas": [0.9, 0.999], "x": 0.1 + 0.2, "text": "é\n"}
    assert checkpoint.read("w").tolist() == [3]


@pytest.mark.parametrize("convert", [lambda x: x, torch.from_numpy])
def test_views_with_odd_strides_are_written_as_their_values(tmp_path, convert):
    base = np.arange(48, dtype=np.float32).reshape(6, 8)
    views = {"column": base[:, 7:], "corner": base[5:, 7:], "every": base[::2, ::2], "turned": base.T}
    tensors = {name: convert(view) for name, view in views.items()}
    keys = [(PieceKey.whole(n, "weight", tuple(t.shape)), t) for n, t in tensors.items()]
    commit(tmp_path / "a", 0, {}, [write_pieces(tmp_path / "a", 0, keys).entry])
    for name, view in views.items():
        np.testing.assert_array_equal(open_checkpoint(tmp_path / "a").read(name), view.ravel())


def test_big_endian_values_are_turned(tmp_path):
    whole(tmp_path / "a", np.arange(4, dtype=">f4"), 64)
    assert open_checkpoint(tmp_path / "a").read("w").tolist() == [0, 1, 2, 3]


def test_empty_tensors_and_idle_ranks(tmp_path):
    keys = [(PieceKey.whole("empty", "weight", (0, 4)), np.zeros((0, 4), np.float32))]
    entries = [write_pieces(tmp_path / "a", rank, keys if rank == 0 else []).entry for rank in range(2)]
    commit(tmp_path / "a", 0, {}, entries, {("empty", "weight"): (0, 4)})
    assert open_checkpoint(tmp_path / "a").read("empty").shape == (0,)
    assert verify(tmp_path / "a") == []


def test_a_gap_stops_the_commit_and_leaves_no_checkpoint(tmp_path):
    tensors = state(1)
    entry = write_pieces(tmp_path / "a", 0, shares(tensors, 0, 2)).entry
    with pytest.raises(IncompleteCheckpoint, match=r"embedding.weight \(weight\): elements \[39, 78\) are missing"):
        commit(tmp_path / "a", 1, {}, [entry], expected_shapes())
    assert not (tmp_path / "a" / "index.json").exists()


def test_pieces_that_do_not_fit_their_key_are_refused(tmp_path):
    key = PieceKey.whole("w", "weight", (4,))
    for bad, message in ((np.zeros(3, np.float32), "16 expected"), (np.array(["x"] * 4), "cannot be stored")):
        with pytest.raises(ValueError, match=message):
            write_pieces(tmp_path / "a", 0, [(key, bad)])
        assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(ValueError, match="leaves the tensor"):
        write_pieces(tmp_path / "a", 0, [(PieceKey("w", "weight", (4,), (2,), (3,), 0, 3), np.zeros(3))])


def test_describe_counts(tmp_path):
    found = describe(saved(save_step(tmp_path, 3)).folder)
    assert (found["step"], found["tensors"], found["parameters"], found["bytes"]) == (3, 3, 132, 3 * 132 * 4)
    assert found["kinds"]["exp_avg"] == {"tensors": 3, "elements": 132, "bytes": 528}
    assert found["shapes"]["final_norm.weight"] == [[6], "float32"]


def test_compare_model_names_each_difference():
    stored = {"hidden_size": 64, "rope": {"theta": 1e4, "kind": "none"}, "kinds": ["global", "local"]}
    assert compare_model(stored, {**stored, "kinds": ("global", "local")}) == []
    wanted = {"hidden_size": 128, "rope": {"theta": 1e4}, "kinds": ["global", "local"], "new": True}
    assert compare_model(stored, wanted) == [
        "hidden_size: 64 in the checkpoint, 128 wanted",
        "new: nothing in the checkpoint, True wanted",
        "rope.kind: 'none' in the checkpoint, nothing wanted",
    ]
