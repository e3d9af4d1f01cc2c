"""From a model's numbers to the columns of a table that a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrain.errors import UserError

OWN = "prediction"  # the column of each row's own task


@dataclass(frozen=True)
class Output:
    """What a model gives for one task.

    Args:
        task: its name.
        kind: its kind's name.
        values: names of its numbers, in the model's order: the task's own for a value, probability, mean count or median;
            `task@level` for further quantiles; `task=class` for the probabilities of classes.
        classes: names of the classes, where it has them; the column `task` is then the likeliest one's name.
    """

    task: str
    kind: str
    values: tuple[str, ...]
    classes: tuple[str, ...] = ()


def value_names(outputs: Sequence[Output]) -> list[str]:
    """Names of all numbers of a row, in the model's order."""
    return [name for output in outputs for name in output.values]


def to_columns(outputs: Sequence[Output], value_NV: NDArray[np.float64]) -> dict[str, pa.Array]:
    """The columns of each task, with null where a value is NaN."""
    columns: dict[str, pa.Array] = {}
    first = 0
    for output in outputs:
        value_NO = value_NV[:, first : first + len(output.values)]
        first += len(output.values)
        missing_NO = np.isnan(value_NO)
        if output.classes:
            likeliest_N = np.where(missing_NO, 0, value_NO).argmax(1)
            named = pa.DictionaryArray.from_arrays(pa.array(likeliest_N, mask=missing_NO[:, 0]), pa.array(output.classes))
            columns[output.task] = named.cast(pa.string())
        for i, name in enumerate(output.values):
            columns[name] = pa.array(value_NO[:, i], mask=missing_NO[:, i])
    return columns


def to_table(
    outputs: Sequence[Output], value_NV: NDArray[np.float64], kept: pa.Table, task: str | None, own_task: bool = False
) -> pa.Table:
    """What is written for some rows: columns of the input that are kept; where `task`, the column that says each row's task, is
    one of them, `prediction` with the number for it; and, unless `own_task`, the columns of all tasks. `check_names` first."""
    columns = {name: kept[name] for name in kept.column_names}
    if task in columns:
        columns[OWN] = _own_value(outputs, value_NV, columns[task])
    return pa.table(columns if own_task else columns | to_columns(outputs, value_NV))


def check_names(outputs: Sequence[Output], kept: Sequence[str], task: str | None, own_task: bool = False) -> None:
    """Refuse two columns of one name in what `to_table` gives, of which one would be lost."""
    columns = [(name, f"column '{name}' of the table") for name in kept]
    if task in kept:
        columns.append((OWN, "the prediction for each row's own task"))
    for output in () if own_task else outputs:
        what = f"a prediction of task '{output.task}'"
        columns += [(name, what) for name in dict.fromkeys((output.task, *output.values))]
    named: dict[str, str] = {}
    for name, what in columns:
        if name in named:
            alone = f", or leave column '{task}' out, or the tasks (--own-task)" if name == OWN and task in kept else ""
            raise UserError(f"{named[name]} and {what} would both be named '{name}'; rename one{alone}")
        named[name] = what


def _own_value(outputs: Sequence[Output], value_NV: NDArray[np.float64], task_N: pa.ChunkedArray) -> pa.Array:
    """Each row's number for its own task; null for a task that the model does not know, and for classes."""
    first_T = np.cumsum([0, *(len(output.values) for output in outputs[:-1])])
    known = {output.task: first for output, first in zip(outputs, first_T.tolist(), strict=True) if not output.classes}
    place_N = pc.index_in(task_N.cast(pa.string()), pa.array(list(known), pa.string()))
    found_N = place_N.is_valid().to_numpy(zero_copy_only=False)
    first_N = np.array([*known.values(), 0])[place_N.fill_null(0).to_numpy()]
    own_N = np.where(found_N, value_NV[np.arange(len(value_NV)), first_N], np.nan)
    return pa.array(own_N, mask=np.isnan(own_N))
