"""Training state <-> safetensors + JSON. Nothing is pickled, so nothing in a checkpoint can run code when it is read.

A tree of dicts, lists, tuples, numbers, strings and tensors is stored as two files: `<name>.json` holds the tree, with
`{"$tensor": "path"}` where a tensor stood, and `<name>.safetensors` holds the tensors under their paths.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from etude.checkpoint.reading import (
    DOCUMENT,
    HEADER_BYTES_PER_TENSOR,
    MAX_TENSORS,
    JsonLimits,
    opened_file,
    opened_folder,
    parse_json_strict,
    read_bounded,
    read_safetensors_checked,
)
from etude.errors import CheckpointError

STATE_TENSORS_PER_PARAMETER = 16
"""More than any optimizer keeps: Adam has 3, its 8-bit form 7."""

SHAPED_LIKE_PARAMETER = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "square_avg"})
"""Entries of optimizer states (Adam, SGD, Adagrad, RMSprop) that have the shape of their parameter."""


def save_tree(folder: Path, name: str, tree: Any, max_tensors: int = MAX_TENSORS) -> None:
    """Write `tree` as `<name>.json` and, where it holds tensors, `<name>.safetensors`.

    Raises:
        CheckpointError: for a value that is neither data nor a tensor, naming its place in the tree; for more than
            `load_tree` would read again.
    """
    tensors: dict[str, torch.Tensor] = {}
    raw = json.dumps(_encode(tree, name, tensors), allow_nan=False, indent=1).encode()
    problem = _limits(max_tensors).problem_of(raw)
    if problem or len(tensors) > max_tensors:
        reason = problem or f"holds {len(tensors):,} tensors, at most {max_tensors:,} are read"
        raise CheckpointError(f"could not be read again: it {reason}", path=folder / f"{name}.json")
    if tensors:
        save_file(tensors, str(folder / f"{name}.safetensors"))
    (folder / f"{name}.json").write_bytes(raw)


def save_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files whose content is known already, by their names in `folder`."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def load_tree(folder: Path, name: str, max_tensors: int = MAX_TENSORS) -> Any:
    """Read what `save_tree` wrote.

    Raises:
        CheckpointError: where a file is missing, malformed or larger than it may be.
    """
    path = folder / f"{name}.json"
    limits = _limits(max_tensors)
    with opened_folder(folder) as opened, opened_file(path.name, folder=opened, shown=path) as descriptor:
        raw = read_bounded(descriptor, limits.num_bytes, shown=path)
    encoded = parse_json_strict(raw, shown=path, limits=limits)
    del raw
    file = folder / f"{name}.safetensors"
    tensors = read_safetensors_checked(file, max_tensors) if file.exists() else {}
    with malformed_means_checkpoint_error(path):
        return _decode(encoded, tensors, path)


def _limits(max_tensors: int) -> JsonLimits:
    """A tree of very many tensors has a long text; every other one is a document like all."""
    return JsonLimits(
        max(DOCUMENT.num_bytes, 2 * HEADER_BYTES_PER_TENSOR * max_tensors),
        max(DOCUMENT.values, 8 * max_tensors),
        max(DOCUMENT.containers, 3 * max_tensors),
    )


def max_optimizer_tensors(names: dict[torch.Tensor, str]) -> int:
    """How many tensors an optimizer of these parameters may keep: the limit of its tree."""
    return MAX_TENSORS + STATE_TENSORS_PER_PARAMETER * len(names)


@contextmanager
def malformed_means_checkpoint_error(path: Path) -> Iterator[None]:
    """Turn what goes wrong with contents of a wrong shape or type into a CheckpointError that names their file."""
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"field {error} is missing", path=path) from error
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(f"does not hold what it should: {reason[0] if reason else error!r}", path=path) from error


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, np.generic):
        value = value.item()
    if torch.is_tensor(value):
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": path}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(item, f"{path}/{key}", tensors) for key, item in value.items()}
        return {"$dict": [[key, _encode(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    raise CheckpointError(f"{path}: a {type(value).__name__} cannot be saved in a checkpoint; keep numbers and tensors")


def _decode(value: Any, tensors: dict[str, torch.Tensor], file: Path) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors, file) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$tensor"}:
        if value["$tensor"] not in tensors:
            raise CheckpointError(f"names a tensor '{value['$tensor']}' that is not in the safetensors file", path=file)
        return tensors[value["$tensor"]]
    if value.keys() == {"$float"}:
        return float(value["$float"])
    if value.keys() == {"$tuple"}:
        return tuple(_decode(item, tensors, file) for item in value["$tuple"])
    if value.keys() == {"$dict"}:
        return {_hashable(key): _decode(item, tensors, file) for key, item in value["$dict"]}
    return {key: _decode(item, tensors, file) for key, item in value.items()}


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def optimizer_tree(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], names: dict[torch.Tensor, str]
) -> dict[str, Any]:
    """An optimizer's state with parameters called by name, so that a changed parameter list is seen, not shuffled."""
    name_of = dict(_numbered_names(optimizer, names))
    groups = [
        {**{key: value for key, value in group.items() if key not in ("params", "param_names")}, "params": params}
        for group, params in zip(
            state_dict["param_groups"],
            [[name_of[number] for number in group["params"]] for group in state_dict["param_groups"]],
            strict=True,
        )
    ]
    state = {name_of.get(number, number): value for number, value in state_dict["state"].items()}
    extra = {key: value for key, value in state_dict.items() if key not in ("state", "param_groups")}
    return {"state": state, "param_groups": groups, "extra": extra}


def load_optimizer_tree(
    optimizer: torch.optim.Optimizer, tree: dict[str, Any], names: dict[torch.Tensor, str], folder: Path
) -> None:
    """Restore `optimizer_tree`'s result.

    Raises:
        CheckpointError: naming the parameters that are new or missing, or the entry that is not what it should be.
    """
    path = folder / "optimizer.json"
    with malformed_means_checkpoint_error(path):
        _check_form(tree, path)
        if _is_numbered(tree):
            tree = _named(tree, optimizer, names, folder)
        _check_contents(optimizer, tree, names, path)
        _load_optimizer_tree(optimizer, tree, names, path)


def _check_form(tree: dict[str, Any], path: Path) -> None:
    groups, state = tree["param_groups"], tree["state"]
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError("field 'param_groups': must be a list of mappings", path=path)
    for number, group in enumerate(groups):
        if not isinstance(group.get("params"), list):
            raise CheckpointError(f"field 'param_groups.{number}.params': must be a list of parameters", path=path)
    if not isinstance(state, dict) or not all(isinstance(entries, dict) for entries in state.values()):
        raise CheckpointError("field 'state': must be a mapping of mappings", path=path)


def _check_contents(
    optimizer: torch.optim.Optimizer, tree: dict[str, Any], names: dict[torch.Tensor, str], path: Path
) -> None:
    """What the optimizer itself would take over as it is, and fail on in the middle of an update."""
    groups = optimizer.param_groups
    if len(tree["param_groups"]) != len(groups):
        raise CheckpointError(
            f"field 'param_groups': {len(tree['param_groups'])} groups, the optimizer has {len(groups)}", path=path
        )
    for number, (saved, group) in enumerate(zip(tree["param_groups"], groups, strict=True)):
        for key, value in saved.items():
            if _is_number(group.get(key)) and not _is_number(value):
                raise CheckpointError(f"field 'param_groups.{number}.{key}': {value!r} is not a number", path=path)
    shapes = {name: parameter.shape for parameter, name in names.items()}
    for name, entries in tree["state"].items():
        for key, value in entries.items():
            where = f"field 'state.{name}.{key}'"
            if not torch.is_tensor(value):
                continue
            if key in SHAPED_LIKE_PARAMETER and name in shapes:
                if value.shape != shapes[name]:
                    shown = f"{tuple(value.shape)}, the parameter has {tuple(shapes[name])}"
                    raise CheckpointError(f"{where} has shape {shown}", path=path)
                if not value.is_floating_point():
                    raise CheckpointError(f"{where} has the type {value.dtype}", path=path)
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise CheckpointError(f"{where} holds NaN or infinity", path=path)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _load_optimizer_tree(
    optimizer: torch.optim.Optimizer, tree: dict[str, Any], names: dict[torch.Tensor, str], path: Path
) -> None:
    number_of = {name: number for number, name in _numbered_names(optimizer, names)}
    saved = [name for group in tree["param_groups"] for name in group["params"]]
    missing, new = sorted(set(number_of) - set(saved)), sorted(set(saved) - set(number_of))
    if missing or new:
        raise CheckpointError(
            f"field 'param_groups': the optimizer state is for other parameters: {_listed(new)} only in the checkpoint, "
            f"{_listed(missing)} only in the model. Use the adapter settings of the checkpoint, or start a new run in "
            "another output_dir",
            path=path,
        )
    current = optimizer.state_dict()["param_groups"]
    groups = [
        {**group, "params": [number_of[name] for name in group["params"]]}
        | ({"param_names": now["param_names"]} if "param_names" in now else {})
        for group, now in zip(tree["param_groups"], current, strict=True)
    ]
    state = {number_of.get(name, name): value for name, value in tree["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups, **tree["extra"]})


def _is_numbered(tree: dict[str, Any]) -> bool:
    """Whether parameters are called by number, as in a checkpoint imported from transformers."""
    return any(isinstance(parameter, int) for group in tree["param_groups"] for parameter in group["params"])


def _named(
    tree: dict[str, Any], optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], folder: Path
) -> dict[str, Any]:
    """The tree with parameters called by name, where groups, numbers and shapes fit the optimizer.

    Raises:
        CheckpointError: they do not.
    """
    name_of = dict(_numbered_names(optimizer, names))
    sizes = [len(group["params"]) for group in tree["param_groups"]]
    now = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != now:
        raise CheckpointError(
            f"the optimizer state is for groups of {sizes} parameters, the model has groups of {now}. Use the adapter "
            "settings and the weight decay of the checkpoint",
            path=folder,
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, state in tree["state"].items():
        for key, value in state.items():
            if torch.is_tensor(value) and value.dim() and value.shape != parameters[number].shape:
                raise CheckpointError(
                    f"{key} of parameter {number} has shape {tuple(value.shape)}, but {name_of[number]} has "
                    f"{tuple(parameters[number].shape)}: the parameters are not in the order they were trained in",
                    path=folder,
                )
    groups = [{**group, "params": [name_of[number] for number in group["params"]]} for group in tree["param_groups"]]
    return {
        **tree,
        "param_groups": groups,
        "state": {name_of[number]: value for number, value in tree["state"].items()},
    }


def _numbered_names(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str]) -> list[tuple[int, str]]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [(number, names.get(parameter, f"parameter-{number}")) for number, parameter in enumerate(parameters)]


def _listed(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def random_tree() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, on every device in use."""
    numpy_state: Any = np.random.get_state()
    tree: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (numpy_state[0], np.asarray(numpy_state[1]).astype(np.int64), *numpy_state[2:]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tree["cuda"] = torch.cuda.get_rng_state_all()
    return tree


def load_random_tree(tree: dict[str, Any]) -> None:
    """Restore `random_tree`'s result; generators of devices that are not here are left alone."""
    random.setstate(tree["python"])
    name, keys, *rest = tree["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(tree["torch"])
    if "cuda" in tree and torch.cuda.is_available() and len(tree["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(tree["cuda"])
