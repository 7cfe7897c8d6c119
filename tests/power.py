"""What a power loss could leave: the file calls of a run, recorded, and every state that a disk may be in after each.

A file that was written is only certain to hold what it held when it was last synced, and a folder only to have the
names that it had when *it* was. So after each call, every folder may be as it is or as it was synced, and every file
that is newer than its last sync may be whole, cut in half, or as it was then (empty, if never).
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest

CALLS = ("fsync", "link", "unlink", "replace", "rename", "mkdir")
Inode = int
Names = Mapping[str, Inode]
Tree = dict[str, bytes | None]
"""Files by their path below the root; None for folders."""
Damage = Literal["none", "half", "lost"]


@dataclass(frozen=True, slots=True)
class Moment:
    """The disk after one call. `promised` is what the run had told the world by then."""

    call: str
    promised: int
    folders: Mapping[Inode, Names]
    synced_folders: Mapping[Inode, Names]
    files: Mapping[Inode, bytes]
    synced_files: Mapping[Inode, bytes]

    def trees(self, root: Inode) -> Iterator[Tree]:
        """All that a power loss could leave."""
        unsure = [each for each, names in self.folders.items() if names != self.synced_folders.get(each, {})]
        for choice in product((True, False), repeat=len(unsure)):
            late = {folder for folder, is_late in zip(unsure, choice, strict=True) if is_late}
            for damage in ("none", "half", "lost"):
                yield self.tree(root, late, damage)

    def tree(self, root: Inode, late: Set[Inode] = frozenset(), damage: Damage = "none") -> Tree:
        """With the folders of `late` as they were synced, and that damage to what was not."""
        tree: Tree = {}
        self._grow(tree, root, "", late, damage)
        return tree

    def _grow(self, tree: Tree, folder: Inode, path: str, late: Set[Inode], damage: Damage) -> None:
        for name, inode in (self.synced_folders.get(folder, {}) if folder in late else self.folders[folder]).items():
            if inode in self.folders:
                tree[path + name] = None
                self._grow(tree, inode, f"{path}{name}/", late, damage)
            else:
                tree[path + name] = self._content(inode, damage)

    def _content(self, inode: Inode, damage: Damage) -> bytes:
        written, synced = self.files[inode], self.synced_files.get(inode, b"")
        if written == synced or damage == "lost":
            return synced
        return written if damage == "none" else written[: len(written) // 2]


@dataclass
class Recorder:
    """Looks at everything below `root` after each call. `promised` is for the run to set."""

    root: Path
    promised: int = 0
    moments: list[Moment] = field(default_factory=list)
    folders: dict[Inode, Names] = field(default_factory=dict)
    synced_folders: dict[Inode, Names] = field(default_factory=dict)
    files: dict[Inode, bytes] = field(default_factory=dict)
    synced_files: dict[Inode, bytes] = field(default_factory=dict)
    handles: dict[Inode, int] = field(default_factory=dict)
    """Of every file that ever was, so that no number is used twice."""

    def after(self, call: str, synced: Inode | None) -> None:
        self._look(self.root)
        for inode, handle in self.handles.items():
            self.files[inode] = os.pread(handle, os.fstat(handle).st_size, 0)
        if synced in self.folders:
            self.synced_folders[synced] = self.folders[synced]
        elif synced in self.files:
            self.synced_files[synced] = self.files[synced]
        folders, files = (dict(self.folders), dict(self.synced_folders)), (dict(self.files), dict(self.synced_files))
        self.moments.append(Moment(call, self.promised, *folders, *files))

    def _look(self, folder: Path) -> None:
        names = {}
        for path in sorted(folder.iterdir()):
            names[path.name] = path.stat().st_ino
            if path.is_dir():
                self._look(path)
            elif names[path.name] not in self.handles:
                self.handles[names[path.name]] = os.open(path, os.O_RDONLY)
        self.folders[folder.stat().st_ino] = names

    def states(self) -> list[tuple[int, Tree]]:
        """What was promised, and what may be there: each pair once."""
        root = self.root.stat().st_ino
        found = {}
        for moment in self.moments:
            for tree in moment.trees(root):
                found[moment.promised, frozenset(tree.items())] = (moment.promised, tree)
        return list(found.values())

    @property
    def last(self) -> Tree:
        """What is there at the end, without any loss."""
        return self.moments[-1].tree(self.root.stat().st_ino)

    def restore(self, tree: Tree) -> None:
        """Make `root` such a state."""
        shutil.rmtree(self.root)
        self.root.mkdir()
        for path, content in tree.items():
            if content is None:
                (self.root / path).mkdir()
            else:
                (self.root / path).write_bytes(content)


@contextmanager
def recorded(root: Path, *, syncs: bool = True) -> Iterator[Recorder]:
    """Record what happens below `root`; without `syncs` as if nobody had synced anything."""
    recorder = Recorder(root)
    recorder.after("begin", None)
    for folder, names in recorder.folders.items():
        recorder.synced_folders[folder] = names

    def recording(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            result = real(*arguments, **keywords)
            is_sync = name == "fsync" and syncs
            recorder.after(name, os.fstat(arguments[0]).st_ino if is_sync else None)
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, recording(name, getattr(os, name)))
        try:
            yield recorder
        finally:
            for handle in recorder.handles.values():
                os.close(handle)
