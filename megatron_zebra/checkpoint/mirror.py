"""A second home for checkpoints: any file system that fsspec knows, such as an object store (s3://, gs://, abfs://).

The same files under the same names. As on disk a checkpoint exists if and only if its index does, and that is written last;
an object appears whole or not at all, so nothing else is needed. All ranks carry their own files up, and share the files that
are brought down.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_zebra.checkpoint import catalog, files, layout
from megatron_zebra.checkpoint.collective import Collective, agree
from megatron_zebra.checkpoint.errors import CheckpointError


class Mirror:
    """The checkpoints under ``url``.

    Raises:
        CheckpointError: fsspec does not know this kind of address, or the package that serves it is not installed.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        try:
            self.fs, self.root = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"checkpoint.mirror = {url}: {error}") from None

    def upload(self, folder: Path, group: Collective, keep_last: int, keep_every: int) -> None:
        """Copy the complete checkpoint ``folder`` up, then remove those that the rule of ``catalog.prune`` no longer keeps."""
        target = f"{self.root}/{folder.name}"

        def own() -> None:
            for ending in ("bin", "json"):
                name = f"{layout.rank_stem(group.rank)}.{ending}"
                self.fs.put_file(str(folder / name), f"{target}/{name}")

        def finish() -> None:
            self.fs.pipe_file(f"{target}/{layout.INDEX}", (folder / layout.INDEX).read_bytes())
            self._prune(keep_last, keep_every, folder.name)

        self._together(group, f"copying {folder.name} to", lambda: self.fs.makedirs(target, exist_ok=True), alone=True)
        self._together(group, f"copying {folder.name} to", own)
        self._together(group, f"copying {folder.name} to", finish, alone=True)

    def fetch_newest(self, root: Path, group: Collective) -> str | None:
        """Bring the newest complete checkpoint down to ``root`` if that has none as new; returns its name, None if not needed.

        What is fetched is checked afterwards as any other checkpoint is.
        """
        name: str | None = None
        folder = root

        def choose() -> None:
            nonlocal name, folder
            local = [entry.step for entry in catalog.entries(root) if entry.complete]
            there = [entry for entry in self._entries() if entry.complete]
            if there and there[-1].step > max(local, default=-1):
                name, folder = there[-1].folder.name, catalog.new_folder(root, there[-1].step)
                files.make_folder(folder)

        self._together(group, "looking for checkpoints in", choose, alone=True)
        name, folder = group.all_gather((name, folder))[0]
        if name is None:
            return None
        index = b""

        def own() -> None:
            nonlocal index
            index = self.fs.cat_file(f"{self.root}/{name}/{layout.INDEX}")
            names = [entry[key] for entry in json.loads(index)["ranks"] for key in ("file", "pieces_file")]
            for one in names[group.rank :: group.world_size]:
                self.fs.get_file(f"{self.root}/{name}/{one}", str(folder / Path(one).name))

        def finish() -> None:
            files.write_whole(folder / layout.INDEX, index)

        self._together(group, f"fetching {name} from", own)
        self._together(group, f"fetching {name} from", finish, alone=True)
        return name

    def _entries(self) -> list[catalog.Entry]:
        self.fs.invalidate_cache()
        if not self.fs.exists(self.root):
            return []
        names = [Path(path).name for path in self.fs.ls(self.root, detail=False)]
        return catalog.parsed(Path(self.root), names, lambda name: self.fs.exists(f"{self.root}/{name}/{layout.INDEX}"))

    def _prune(self, keep_last: int, keep_every: int, written: str) -> None:
        """What is ``written`` stays, however many of later steps there are: the run may have gone back behind those."""
        for entry in catalog.outlived(self._entries(), keep_last, keep_every):
            if entry.folder.name == written:
                continue
            path = f"{self.root}/{entry.folder.name}"
            if entry.complete:
                self.fs.rm_file(f"{path}/{layout.INDEX}")
            self.fs.rm(path, recursive=True)

    def _together(self, group: Collective, doing: str, act: Callable[[], None], alone: bool = False) -> None:
        """All ranks (or rank 0 ``alone``) act; a failure on one is an error on all."""
        failure: Exception | None = None
        if group.rank == 0 or not alone:
            try:
                with _naming(doing, self.url):
                    act()
            except CheckpointError as error:
                failure = error
        agree(group, failure)


@contextmanager
def _naming(doing: str, url: str) -> Iterator[Any]:
    """What goes wrong on a network has many types, of packages that we do not import."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        raise CheckpointError(f"{doing} {url}: {type(error).__name__}: {' '.join(first)}") from error
