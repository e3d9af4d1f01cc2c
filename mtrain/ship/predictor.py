"""Predict with an exported model: `Predictor.load(folder).predict(table)`.

Needs what the features need, and torch or onnxruntime; nothing of the trainer.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtrain.components import Spec, build
from mtrain.data import FEATURES
from mtrain.data.features import Feature, encode_column, transform_rows
from mtrain.errors import UserError, nearest
from mtrain.ship.columns import Output, check_names, to_table

VERSION = 1
ABOUT, PROGRAM, ONNX, INPUTS = "predictor.json", "model.pt2", "model.onnx", "features.json"
INPUT, VALUES = "inputs", "values"  # names of the model's input and output
ROWS = 2048  # of a pass

Rows = NDArray[np.float32]
Model = Callable[[Rows], NDArray[np.float64]]


class Predictor:
    """An exported model with its features. `load` makes one.

    Attributes:
        model: encoded inputs `[B, F]` to numbers `[B, V]`.
        outputs: what it gives for each task.
        thresholds: of binary tasks, by name: a probability from there on is positive, if F1 is what counts.
        columns: of the inputs.
    """

    def __init__(self, model: Model, features: list[tuple[list[str], Feature]], about: dict[str, Any]):
        self.model, self._features = model, features
        self.outputs = [Output(one["task"], one["kind"], tuple(one["values"]), tuple(one["classes"])) for one in about["tasks"]]
        self.thresholds = {one["task"]: one["threshold"] for one in about["tasks"] if one["threshold"] is not None}
        self.columns = list(dict.fromkeys(name for names, _ in features for name in names))
        self._key, self._task = about["key"], about["task"]

    @staticmethod
    def load(folder: str | Path, backend: Literal["torch", "onnx"] = "torch") -> Predictor:
        """Read a folder that `mtrain export` wrote.

        Args:
            backend: what computes: torch, or onnxruntime, which then needs no torch.

        Raises:
            UserError: it is no such folder, of another format, damaged, or lacks the model for the backend.
        """
        folder = Path(folder)
        if not (folder / ABOUT).is_file():
            raise UserError(f"{folder}: holds no {ABOUT}; expected a folder that mtrain export wrote")
        with _whole(folder / ABOUT):
            about = json.loads((folder / ABOUT).read_text())
            if about["format"] != VERSION:
                raise UserError(f"{folder}: is of format {about['format']}, this mtrain reads {VERSION}; export the run again")
        loaders: dict[str, tuple[str, Callable[[Path], Model]]] = {"torch": (PROGRAM, _torch), "onnx": (ONNX, _onnx)}
        if backend not in loaders:
            raise UserError(f"backend '{backend}' is unknown{nearest(backend, loaders)}")
        file, load = loaders[backend]
        if not (folder / file).is_file():
            raise UserError(f"{folder}: holds no {file}, which backend '{backend}' needs; export the run again with it")
        features = []
        with _whole(folder / INPUTS):
            for item in json.loads((folder / INPUTS).read_text()):
                feature = build(Spec.model_validate(item["feature"]), FEATURES, f"{folder / INPUTS}")
                feature.load_state_dict(item["state"])
                features.append((item["columns"], feature))
        with _whole(folder / file):
            model = load(folder / file)
        with _whole(folder / ABOUT):
            return Predictor(model, features, about)

    def predict(self, table: Any) -> Any:
        """A column for each number of each row, as `mtrain predict` writes them; a key that is among the columns comes along.
        Warns of rows that name a task which the model has not: their `prediction` is missing.

        Args:
            table: a data frame of pandas, a table of pyarrow, or the path of a Parquet or CSV file.

        Returns:
            A data frame for a data frame, else a table of pyarrow.

        Raises:
            UserError: a column is missing, or holds a value that cannot be used.
        """
        rows = _to_arrow(table)
        value_NV = self.values(rows)
        if self._task in rows.column_names:
            self._warn_of_tasks(rows[self._task])
        kept = rows.select([name for name in dict.fromkeys((self._key, self._task)) if name in rows.column_names])
        check_names(self.outputs, kept.column_names, self._task)
        found = to_table(self.outputs, value_NV, kept, self._task)
        return found if isinstance(table, pa.Table | str | Path) else found.to_pandas().set_index(table.index)

    def _warn_of_tasks(self, task_N: pa.ChunkedArray) -> None:
        known = pa.array([output.task for output in self.outputs], pa.string())
        unknown = task_N.filter(pc.invert(pc.is_in(task_N.cast(pa.string()), known)))
        if len(unknown):
            warnings.warn(
                f"column '{self._task}': {len(unknown)} of {len(task_N)} rows name no task of the model, the first "
                f"{unknown[0].as_py()!r}: they have no prediction",
                stacklevel=3,
            )

    def values(self, rows: pa.Table) -> NDArray[np.float64]:
        """The numbers `[N, V]` of the rows, in the order of `outputs`; NaN where a row cannot be used."""
        for name in self.columns:
            if (times := rows.column_names.count(name)) != 1:
                raise UserError(
                    f"{times} columns of the table are named '{name}', expected one; rename or drop the others"
                    if times
                    else f"no column '{name}' in the table{nearest(name, rows.column_names)}"
                )
        if not len(rows):
            return np.empty((0, sum(len(output.values) for output in self.outputs)))
        encoded = [encode_column(rows, names, feature, cache=False) for names, feature in self._features]
        blocks = [transform_rows(one, names, feature) for (names, feature), one in zip(self._features, encoded, strict=True)]
        x_NF = np.concatenate(blocks, axis=1)
        value_NV = np.concatenate([self.model(x_NF[at : at + ROWS]) for at in range(0, len(x_NF), ROWS)])
        value_NV[~np.logical_and.reduce([one.valid for one in encoded])] = np.nan
        return value_NV


def _torch(file: Path) -> Model:
    import torch

    program = torch.export.load(file).module()

    def model(x_BF: Rows) -> NDArray[np.float64]:
        with torch.no_grad():
            return program(torch.from_numpy(x_BF)).numpy()

    return model


def _onnx(file: Path) -> Model:
    try:
        import onnxruntime
    except ImportError:
        raise UserError('backend onnx needs onnxruntime: pip install "mtrain[export]"') from None
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda x_BF: session.run([VALUES], {INPUT: x_BF})[0]


def _to_arrow(table: Any) -> pa.Table:
    if isinstance(table, pa.Table):
        return table
    if isinstance(table, str | Path):
        path = Path(table)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if not {".parquet", ".pq", ".csv", ".tsv"} & set(path.suffixes):
            raise UserError(f"{path}: expected a .parquet, .csv or .tsv file; read others yourself and give the table")
        try:
            if path.suffix in (".parquet", ".pq"):
                return pq.read_table(path)
            import pandas as pd

            # as tables are read for training, or an empty cell or NA would be another category
            table = pd.read_csv(path, sep="\t" if ".tsv" in path.suffixes else ",", low_memory=False)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read, {_first_line(error)}") from error
    if not hasattr(table, "iloc"):
        raise UserError(f"found {type(table).__name__}, expected a data frame of pandas, a table of pyarrow, or a path")
    try:
        return pa.Table.from_pandas(table, preserve_index=False)
    except (ValueError, TypeError) as error:  # columns of one name, or of values of several types
        raise UserError(f"the data frame cannot be used, {_first_line(error)}") from error


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    """Say that a file is missing or damaged; what reads it raises many types."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except Exception as error:
        raise UserError(f"{file}: cannot be read, {_first_line(error)}; export the run again") from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:300]}"
