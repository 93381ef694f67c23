"""What a power loss may leave on disk: a model of a file system that keeps only what was synced, and anything else or not.

A kill does not lose the page cache, so no kill test can see a missing fsync. Here the operations of a real save are
replayed up to every point, and every state that the disk may then hold is written out: bytes of a file that was not synced
are there, lost, torn or zero; names in a folder that was not synced are there or not, each for itself. This is more
pessimistic than any file system in use.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

Operation = tuple[str, str, str]  # name, path, more
Tree = dict[str, "bytes | Tree"]


@dataclass
class File:
    now: bytes = b""
    durable: bytes = b""

    def states(self) -> list[bytes]:
        """What may be on disk, the best first."""
        if self.now == self.durable:
            return [self.now]
        half = self.now[: len(self.now) // 2]
        return list(dict.fromkeys([self.now, self.durable, half, b"\0" * len(self.now)]))


@dataclass
class Folder:
    now: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[tuple[str | None, str | None]] = field(default_factory=list)  # (name gone, name come)
    nodes: list[File | Folder | None] = field(default_factory=list)  # what came, in step with `pending`

    def change(self, gone: str | None, come: str | None, node: File | Folder | None) -> None:
        if gone is not None:
            del self.now[gone]
        if come is not None and node is not None:
            self.now[come] = node
        self.pending.append((gone, come))
        self.nodes.append(node)

    def sync(self) -> None:
        self.durable, self.pending, self.nodes = dict(self.now), [], []

    def entries(self) -> Iterator[dict[str, File | Folder]]:
        """Which names may be on disk, all of them first. With many pending: all, none, each one lost, each one alone."""
        indices = range(len(self.pending))
        if len(self.pending) <= 4:
            chosen = [set(c) for n in reversed(range(len(indices) + 1)) for c in itertools.combinations(indices, n)]
        else:
            chosen = [set(indices), set(), *(set(indices) - {i} for i in indices), *({i} for i in indices)]
        for subset in chosen:
            names = dict(self.durable)
            for i in sorted(subset):
                gone, come = self.pending[i]
                node = self.nodes[i]
                if gone is not None:
                    names.pop(gone, None)
                if come is not None and node is not None:
                    names[come] = node
            yield names

    def states(self) -> Iterator[Tree]:
        """What may be on disk. Below each set of names, one child at a time is in another state than its best, then all
        of them are in their worst."""
        for names in self.entries():
            options = {name: _states_of(name, node) for name, node in names.items()}
            best: Tree = {name: states[0] for name, states in options.items()}
            yield best
            for name, states in options.items():
                for state in states[1:]:
                    yield {**best, name: state}
            yield {name: states[-1] for name, states in options.items()}


def _states_of(name: str, node: File | Folder) -> list[bytes | Tree]:
    states: list[bytes | Tree] = list(node.states())
    never_loaded = name.startswith((".tmp-", ".trash-", ".etude.lock"))
    return states[:1] if never_loaded else states


def read_log(log: Path) -> list[Operation]:
    operations = []
    for line in log.read_text().splitlines():
        name, path, more = line.split("\t")
        if name not in ("failed", "list") and (name, more) != ("open", "read"):
            operations.append((name, path, more))
    return operations


def from_disk(path: Path) -> File | Folder:
    """A tree as it lies on disk, taken to be durable."""
    if path.is_file():
        content = path.read_bytes()
        return File(content, content)
    children = {child.name: from_disk(child) for child in path.iterdir()}
    return Folder(dict(children), dict(children))


def replay(base: Folder, base_path: Path, operations: list[Operation]) -> None:
    """Apply operations, which name paths below `base_path`, to the model."""
    for name, path, more in operations:
        if name == "mark":
            continue
        relative = PurePosixPath(path).relative_to(base_path)
        parent = _find(base, relative.parent)
        assert isinstance(parent, Folder)
        leaf = relative.name
        node = parent.now.get(leaf) if leaf else base
        if name == "mkdir":
            parent.change(None, leaf, Folder())
        elif name == "open":
            if node is None:
                parent.change(None, leaf, File())
            elif more == "trunc":
                node.now = b""
        elif name == "unlink":
            parent.change(leaf, None, None)
        elif name == "rename":
            target = PurePosixPath(more).relative_to(base_path)
            assert target.parent == relative.parent, "a rename across folders is not modelled"
            parent.change(leaf, target.name, node)
        elif name == "fsync" and isinstance(node, Folder):
            node.sync()
        elif name == "fsync":
            node.durable = node.now
        elif name == "write":
            node.now += bytes.fromhex(more)
        elif name == "truncate":
            node.now = b""
        elif name == "pwrite":
            node.now = bytes.fromhex(more)
        else:
            raise AssertionError(f"{name} is not modelled")


def write_out(tree: Tree, path: Path) -> None:
    path.mkdir()
    for name, content in tree.items():
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        else:
            write_out(content, path / name)


def content_of(node: File | Folder) -> bytes | Tree:
    """What programs see now."""
    if isinstance(node, File):
        return node.now
    return {name: content_of(child) for name, child in node.now.items()}


def _find(folder: Folder, path: PurePosixPath) -> File | Folder:
    node: File | Folder = folder
    for part in path.parts:
        assert isinstance(node, Folder)
        node = node.now[part]
    return node
