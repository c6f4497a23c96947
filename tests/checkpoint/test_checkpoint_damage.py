"""Whatever is wrong with a file is named; nothing wrong is ever returned."""

import json
import random
import re
import shutil

import numpy as np
import pytest

from megatron_zebra.checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    OtherFormat,
    find_latest_good,
    layout,
    open_checkpoint,
    verify,
)
from tests.checkpoint.cases import content_of, run_ranks, save_step, saved, state


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    root = tmp_path_factory.mktemp("template")
    for step in (1, 2):
        saved(save_step(root, step))
    return root


@pytest.fixture
def root(template, tmp_path):
    return shutil.copytree(template, tmp_path / "root")


@pytest.fixture
def newest(root):
    return root / "step-00000002"


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_byte_in_any_piece_is_named_and_never_returned(newest):
    checkpoint = open_checkpoint(newest)
    for name, kind in checkpoint.tensors():
        for piece in checkpoint.pieces(name, kind):
            path = newest / piece.file
            for position in (piece.byte_offset, piece.byte_offset + piece.byte_length - 1):
                flip(path, position)
                with pytest.raises(
                    DamagedCheckpoint, match=r"rank-0000\d.bin: checksum \w{8}, expected \w{8}.*"
                ) as error:
                    checkpoint.read(name, kind)
                assert str(piece.key) in str(error.value)
                assert str(path) in str(error.value)
                problems = verify(newest)
                assert len(problems) == 1
                assert str(piece.key) in problems[0]
                flip(path, position)
    assert verify(newest) == []


def test_a_cut_or_missing_data_file_names_what_it_held(newest):
    checkpoint, path = open_checkpoint(newest), newest / "rank-00001.bin"
    data = path.read_bytes()
    for damage, message in (
        (lambda: path.write_bytes(data[:-1]), f"{len(data) - 1} bytes, {len(data)} expected"),
        (lambda: path.write_bytes(data + b"x"), f"{len(data) + 1} bytes, {len(data)} expected"),
        (path.unlink, "No such file"),
    ):
        damage()
        with pytest.raises(
            DamagedCheckpoint, match=f"{message}.*final_norm.weight \\(exp_avg\\) elements \\[3, 6\\)"
        ) as e:
            checkpoint.read("final_norm.weight", "exp_avg")
        assert str(path) in str(e.value)
        assert [message in p and str(path) in p for p in verify(newest)] == [True]
    # what only needs the other file is still served
    np.testing.assert_array_equal(
        checkpoint.read("final_norm.weight", flat_numel=3), state(2)["final_norm.weight", "weight"][:3]
    )


def rewrite(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


DAMAGES = {
    "missing list": (lambda f: (f / "rank-00000.json").unlink(), "rank-00000.json: No such file"),
    "empty list": (lambda f: (f / "rank-00000.json").write_bytes(b""), "rank-00000.json: 0 bytes"),
    "altered list": (lambda f: flip(f / "rank-00001.json", 50), "rank-00001.json: .* checksum"),
    "garbage index": (lambda f: (f / "index.json").write_bytes(b"\x00\xffgarbage"), "index.json: not JSON"),
    "empty index": (lambda f: (f / "index.json").write_bytes(b""), "index.json: not JSON"),
    "index of a list": (lambda f: (f / "index.json").write_text("[1]"), "index.json: a JSON object was expected"),
    "deep index": (lambda f: (f / "index.json").write_text("[" * 100_000), "index.json: not JSON"),
    "other format": (
        lambda f: rewrite(f / "index.json", lambda d: d.update(format=99)),
        "index.json: checksum",
    ),
    "no format": (lambda f: rewrite(f / "index.json", lambda d: d.pop("format")), "index.json: checksum"),
    "other step": (lambda f: rewrite(f / "index.json", lambda d: d.update(step=7)), "index.json: checksum"),
    "no ranks": (lambda f: rewrite(f / "index.json", lambda d: d.pop("ranks")), "index.json: checksum"),
    "no index": (lambda f: (f / "index.json").unlink(), "no index.json: half-written"),
    "index is a folder": (lambda f: ((f / "index.json").unlink(), (f / "index.json").mkdir()), "index.json"),
    "missing data": (lambda f: (f / "rank-00000.bin").unlink(), "rank-00000.bin: No such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_last_good_one_is_used_by_all_ranks(root, newest, damage):
    act, message = DAMAGES[damage]
    act(newest)
    problems = verify(newest)
    assert len(problems) == 1
    assert re.search(message, problems[0])
    assert "\n" not in problems[0]
    if damage != "missing data":
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(newest)
    for found in (
        find_latest_good(root),
        find_latest_good(root, deep=False),
        *run_ranks(3, lambda g: find_latest_good(root, g)),
    ):
        assert (found.step, found.folder) == (1, root / "step-00000001")
        assert len(found.skipped) == 1
        assert re.search(r"step-00000002.*skipped", found.skipped[0])
        assert re.search(message, found.skipped[0])
    assert content_of(root / "step-00000001") == 1


def test_another_format_version_is_named_not_passed_over(root, newest):
    """Else an older program would set aside, and in time remove, what a newer one saved."""

    def change(document):
        document["format"] = 99
        del document["checksum"]
        document["checksum"] = layout.checksum(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())

    rewrite(newest / "index.json", change)
    for result in run_ranks(3, lambda group: error_of(lambda: find_latest_good(root, group))):
        assert result.endswith("index.json: format version 99, this program reads 1")
    assert "format version 99" in verify(newest)[0]
    with pytest.raises(OtherFormat):
        open_checkpoint(newest)


def test_when_none_is_good_the_caller_can_tell_damage_from_nothing(root):
    for step in (1, 2):
        (root / f"step-0000000{step}" / "rank-00001.bin").write_bytes(b"")
    found = find_latest_good(root)
    assert (found.folder, found.step, found.rejected, len(found.skipped)) == (None, None, 2, 2)
    for step in (1, 2):
        (root / f"step-0000000{step}" / "index.json").unlink()
    assert find_latest_good(root).rejected == 0


def test_a_flip_that_one_rank_finds_is_known_to_all(root, newest):
    flip(newest / "rank-00001.bin", 5)
    shares = [verify(newest, rank, 4) for rank in range(4)]
    assert [len(share) for share in shares].count(1) == 1
    assert [found.step for found in run_ranks(4, lambda g: find_latest_good(root, g))] == [1] * 4
    assert find_latest_good(root, deep=False).step == 2


def test_ranks_share_the_reading_and_read_every_byte_once(newest):
    checkpoint = open_checkpoint(newest)
    total = sum(p.byte_length for t in checkpoint.tensors() for p in checkpoint.pieces(*t))
    for world_size in (1, 2, 3, 7, 50):
        counts = []
        for rank in range(world_size):
            seen = []
            assert verify(newest, rank, world_size, seen.append) == []
            counts.append(sum(seen))
        assert sum(counts) == total
        assert max(counts) <= total // world_size + 40 * 4  # no more than the largest block above the mean


def test_nothing_at_all(tmp_path):
    assert find_latest_good(tmp_path / "never").folder is None
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        open_checkpoint(tmp_path / "never")


def test_max_step_passes_over_later_ones(root):
    assert find_latest_good(root, max_step=1).step == 1
    assert find_latest_good(root, max_step=0).step is None


def mutate(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 2:
            data[at:at] = data[rng.randrange(len(data)) :][: rng.randrange(1, 60)]
        elif kind == 3:
            data[at:at] = rng.choice((b"9" * 30, b"-1", b"1e9", b"null", b'"', b"[[", b"{}", b"\xff\xfe", b"NaN"))
        else:
            data = data[:at]
        if not data:
            return b""
    return bytes(data)


def error_of(act):
    """The message of our error, None without one; any other exception passes."""
    try:
        act()
    except CheckpointError as error:
        return str(error)


def read_all(folder):
    checkpoint = open_checkpoint(folder)
    for tensor in checkpoint.tensors():
        checkpoint.read(*tensor)


@pytest.mark.parametrize("name", ["index.json", "rank-00000.json"])
def test_mutated_json_is_an_error_or_changes_nothing(newest, name):
    rng, path = random.Random(1), newest / name
    original = path.read_bytes()
    for _ in range(400):
        path.write_bytes(mutate(rng, original))
        error = error_of(lambda: content_of(newest))
        assert error is None or (name in error and "\n" not in error and len(error) < 600)


def test_mutated_lists_that_pass_for_checked_are_still_refused_or_right(newest, monkeypatch):
    """Behind the checksums the decoder trusts nothing either (a foreign program may have written the file)."""
    from megatron_zebra.checkpoint import reader

    def unchecked(data, entry, where):
        honest = layout.RankFile(
            entry.rank, entry.file, entry.size, entry.pieces_file, len(data), layout.checksum(data)
        )
        return decode(data, honest, where)

    decode = layout.decode_pieces
    monkeypatch.setattr(reader.layout, "decode_pieces", unchecked)
    rng, path = random.Random(2), newest / "rank-00000.json"
    original = path.read_bytes()
    for _ in range(400):
        path.write_bytes(mutate(rng, original))
        error = error_of(lambda: read_all(newest))
        assert error is None or "\n" not in error
