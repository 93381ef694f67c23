"""Copies of what a checkpoint will hold, which the steps that follow do not change.

The memory of tensors is used again from one checkpoint to the next. Copies of what lies on a GPU are page-locked, so that
they are made at the full speed of the bus. They are waited for where they are taken: a thread that called the driver could
break a CUDA graph that is being captured meanwhile.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch


class Copies:
    """Copies trees of dicts, lists, tuples, plain values and tensors into memory of its own."""

    def __init__(self) -> None:
        self._free: dict[tuple[Any, ...], list[torch.Tensor]] = defaultdict(list)
        self._in_use: dict[tuple[Any, ...], list[torch.Tensor]] = defaultdict(list)

    @torch.no_grad()
    def take(self, tree: Any) -> Any:
        """A copy of `tree`. The copy taken before is given up: its memory is used again.

        What is one object in several places of the tree is one object in the copy as well.
        """
        for shape, buffers in self._in_use.items():
            self._free[shape] += reversed(buffers)
        self._in_use.clear()
        tensors: list[torch.Tensor] = []
        memo: dict[int, Any] = {}
        result = self._copied(tree, memo, tensors)
        self._fill(tensors, [memo[id(tensor)] for tensor in tensors])
        self._free.clear()  # of what is not there any more
        return result

    def _copied(self, value: Any, memo: dict[int, Any], tensors: list[torch.Tensor]) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if id(value) in memo:
            return memo[id(value)]
        kind: Any = type(value)
        if kind in (torch.Tensor, torch.nn.Parameter) and not vars(value):
            result: Any = self._buffer(value)
            tensors.append(value)
        elif kind is dict:
            result = {key: self._copied(item, memo, tensors) for key, item in value.items()}
        elif kind is list:
            result = [self._copied(item, memo, tensors) for item in value]
        elif kind is tuple:
            result = tuple([self._copied(item, memo, tensors) for item in value])
            if all(new is old for new, old in zip(result, value, strict=True)):
                result = value
        else:  # whatever else an optimizer or a callback keeps
            result = copy.deepcopy(value, memo)
        memo[id(value)] = result
        return result

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        shape = (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_cuda)
        free = self._free[shape]
        buffer = free.pop() if free else _like(tensor)
        self._in_use[shape].append(buffer)
        return buffer

    def _fill(self, tensors: list[torch.Tensor], buffers: list[torch.Tensor]) -> None:
        if not tensors:
            return
        torch._foreach_copy_(buffers, [tensor.detach() for tensor in tensors], non_blocking=True)
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """Memory for a copy, in the same order as far as it has no gaps."""
    return torch.empty_like(
        tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False, memory_format=torch.preserve_format
    )


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
