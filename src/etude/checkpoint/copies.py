"""Copies of what a checkpoint will hold, which the steps that follow do not change.

The memory of tensors is used again from one checkpoint to the next. Tensors of a GPU are copied while training goes on, so
whoever reads the copies waits for their arrival first. That thread may call the driver then while a CUDA graph is captured
in another, which has to be captured in a mode that allows it (`capture_error_mode="thread_local"`).
"""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from etude.checkpoint.pages import PAGE_BYTES, Pages, empty_copy

TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})

PLAIN = frozenset({type(None), bool, int, float, str})


class _CopiedTree(NamedTuple):
    """A tree with other tensors in it, to which those of the original are still to be copied."""

    tree: Any
    gathered: list[torch.Tensor]
    """Of the original, for the pages. They stand in the tree themselves where they have no place in the pages yet."""
    alone: list[torch.Tensor]
    """The others, also of the original."""
    buffers_of_alone: list[torch.Tensor]


class Copies:
    """Copies trees of dicts, lists, tuples, plain values and tensors into memory of its own.

    Tensors of the devices of one type are gathered in pages; others are copied one by one.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        self.device_type = device_type
        self._is_gathered: Callable[[torch.Tensor], bool] = operator.attrgetter(f"is_{device_type}")
        self._pages = Pages(pinned=device_type == "cuda")
        self._free: dict[tuple[Any, ...], list[torch.Tensor]] = defaultdict(list)
        self._in_use: dict[tuple[Any, ...], list[torch.Tensor]] = defaultdict(list)

    def reserve(self, sizes: Iterable[int]) -> None:
        """Take the memory ahead for tensors of a GPU with so many bytes each, other than those larger than a page."""
        self._pages.reserve(sum(size for size in sizes if size <= PAGE_BYTES))

    @torch.no_grad()  # or the views of parameters that are kept would keep nodes of autograd, on the stream of now
    def rehearse(self, tree: Any) -> None:
        """Find the places of what is gathered of a tree that `take` will be given later. The memory of its tensors lives
        until then."""
        self._pages.find(self._copied_tree(tree).gathered)

    @torch.no_grad()
    def take(self, tree: Any) -> Any:
        """A copy of `tree`, whose tensors are there after `arrive`. The copy taken before is given up: its memory is used
        again.

        What is one object in several places of the tree is one object in the copy as well.
        """
        copied = self._copied_tree(tree)
        if not self._pages.fit(copied.gathered):
            copied = self._copied_tree(tree)
        self._pages.begin(copied.gathered)
        if copied.alone:
            torch._foreach_copy_(copied.buffers_of_alone, copied.alone)
        self._free.clear()  # of what is not there any more
        return copied.tree

    def arrive(self) -> None:
        """Wait until the tensors of the copy taken last are there, in whichever thread."""
        self._pages.arrive()

    def _copied_tree(self, tree: Any) -> _CopiedTree:
        for shape, buffers in self._in_use.items():
            self._free[shape] += reversed(buffers)
        self._in_use.clear()
        gathered: list[torch.Tensor] = []
        alone: list[torch.Tensor] = []
        buffers_of_alone: list[torch.Tensor] = []
        memo: dict[int, Any] = {}
        known, hosts, is_gathered = memo.get, iter(self._pages.hosts), self._is_gathered

        def copied(value: Any) -> Any:
            result: Any = known(id(value))
            if result is not None:
                return result
            kind: Any = type(value)
            if kind in TENSORS and not value.__dict__:
                if is_gathered(value):
                    gathered.append(value)
                    result = next(hosts, value)
                else:
                    alone.append(value)
                    buffers_of_alone.append(result := self._buffer(value))
            elif kind is dict:  # a call for each plain value would take as long as all the rest
                result = {key: item if type(item) in PLAIN else copied(item) for key, item in value.items()}
            elif kind is list:
                result = [item if type(item) in PLAIN else copied(item) for item in value]
            elif kind is tuple:
                result = tuple([item if type(item) in PLAIN else copied(item) for item in value])
                if all(map(operator.is_, result, value)):
                    result = value
            elif value is None or isinstance(value, (bool, int, float, str)):
                result = value
            else:  # whatever else an optimizer or a callback keeps
                result = copy.deepcopy(value, memo)
            memo[id(value)] = result
            return result

        return _CopiedTree(copied(tree), gathered, alone, buffers_of_alone)

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        shape = (tensor.shape, tensor.stride(), tensor.dtype)
        free = self._free[shape]
        buffer = free.pop() if free else empty_copy(tensor, pinned=False)
        self._in_use[shape].append(buffer)
        return buffer


def on_host(tree: Any) -> Any:
    """The tree with tensors of a GPU copied to the host; what lies there already is the same object."""
    if torch.is_tensor(tree):
        return tree.to("cpu") if tree.is_cuda else tree
    if type(tree) is dict:
        return {key: on_host(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        items = [on_host(value) for value in tree]
        unchanged = all(new is old for new, old in zip(items, tree, strict=True))
        return tree if unchanged else type(tree)(items)
    return tree
