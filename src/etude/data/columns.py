"""Which columns of a dataset the model's forward can take, and dropping the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from etude.errors import DataError


def accepted_columns(model: Any, label_names: list[str]) -> list[str]:
    """Names of the arguments of the model's forward, of the labels, and the two spellings collators turn into them."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(base).__name__ == "PeftMixedModel":  # takes anything and passes it on
        base = base.base_model.model
    parameters = inspect.signature(base.forward).parameters
    return list(dict.fromkeys([*parameters, "label", "label_ids", *label_names]))


def drop_unused_columns(dataset: Any, accepted: list[str]) -> Any:
    """A `datasets.Dataset` without the columns that the model's forward does not take.

    Raises:
        DataError: where no column would be left.
    """
    unused = [name for name in dataset.column_names if name not in accepted]
    if unused and len(unused) == len(dataset.column_names):
        raise DataError(
            f"no column of the dataset is an argument of the model's forward: it has {', '.join(unused)}. Tokenise it "
            "to input_ids and labels first, or pass remove_unused_columns=False where the collator uses these columns"
        )
    return dataset.remove_columns(unused) if unused else dataset


class ColumnDroppingCollator:
    """Drops from each row (a dict) what the model's forward does not take, then collates."""

    def __init__(self, collator: Callable[[list[Any]], Any], accepted: list[str]) -> None:
        self.collator, self.accepted = collator, frozenset(accepted)

    def __call__(self, rows: list[Any]) -> Any:
        return self.collator([self._accepted_part(row) for row in rows])

    def _accepted_part(self, row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        return {name: value for name, value in row.items() if name in self.accepted}
