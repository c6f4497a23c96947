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
        self._home: tuple[Any, str] | None
        try:
            self._home = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"checkpoint.mirror = {url}: {error}") from None
        except Exception:
            self._home = None  # one that connects at once, and cannot now: told where it is used

    @property
    def fs(self) -> Any:
        return self._opened()[0]

    @property
    def root(self) -> str:
        return str(self._opened()[1])

    def apart_from(self, checkpoints: Path) -> None:
        """CheckpointError if this is no second home for what lies in the folder ``checkpoints``."""
        kinds = (
            set()
            if self._home is None
            else {self.fs.protocol}
            if isinstance(self.fs.protocol, str)
            else {*self.fs.protocol}
        )
        if "memory" in kinds:
            raise CheckpointError(f"checkpoint.mirror = {self.url}: ends with the process; give a place that stays")
        if "file" in kinds:
            here, there = checkpoints.resolve(), Path(self.root).resolve()
            if here == there or here in there.parents or there in here.parents:
                raise CheckpointError(
                    f"checkpoint.mirror = {self.url}: holds the run's own checkpoints, or lies within them; give another place"
                )

    def upload(self, folder: Path, group: Collective, keep_last: int, keep_every: int) -> None:
        """Copy the complete checkpoint ``folder`` up, then remove those that the rule of ``catalog.prune`` no longer keeps."""

        def target() -> str:  # asked where a home that cannot be reached is told of
            return f"{self.root}/{folder.name}"

        def own() -> None:
            for ending in ("bin", "json"):
                name = f"{layout.rank_stem(group.rank)}.{ending}"
                self.fs.put_file(str(folder / name), f"{target()}/{name}")

        def finish() -> None:
            self.fs.pipe_file(f"{target()}/{layout.INDEX}", (folder / layout.INDEX).read_bytes())
            self._prune(keep_last, keep_every, folder.name)

        self._together(
            group, f"copying {folder.name} to", lambda: self.fs.makedirs(target(), exist_ok=True), alone=True
        )
        self._together(group, f"copying {folder.name} to", own)
        self._together(group, f"copying {folder.name} to", finish, alone=True)

    def newer(self, step: int, group: Collective) -> list[str]:
        """Names of the complete checkpoints after ``step``, the newest first; the same on all ranks."""
        names: list[str] = []

        def look() -> None:
            names.extend(e.folder.name for e in reversed(self._entries()) if e.complete and e.step > step)

        self._together(group, "looking for checkpoints in", look, alone=True)
        return group.all_gather(names)[0]

    def fetch(self, name: str, root: Path, group: Collective) -> Path:
        """Bring the checkpoint ``name`` down into a new folder of its step under ``root``, which is returned.

        It is not checked: that is done as with any other checkpoint.
        """
        folder = root

        def make() -> None:
            nonlocal folder
            (entry,) = catalog.parsed(root, [name], lambda _: True)
            folder = catalog.new_folder(root, entry.step)
            files.make_folder(folder)

        self._together(group, f"fetching {name} from", make, alone=True)
        folder = group.all_gather(folder)[0]
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
        return folder

    def _opened(self) -> tuple[Any, str]:
        if self._home is None:
            from fsspec.core import url_to_fs

            self._home = url_to_fs(self.url)
        return self._home

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
