import numpy as np
import pyarrow as pa
import pytest

from mtrain.components import Spec
from mtrain.data.features import Encoded, Feature
from mtrain.data.inputs import FeatureColumn, fitting_sample
from mtrain.data.tables import ReadError
from mtrain.errors import UserError


class Lists:
    """Chunks of rows of one list column; None: a chunk that cannot be read."""

    def __init__(self, *chunks):
        self.chunks, self.reads = chunks, []
        self.start_C = np.cumsum([0, *(len(rows or [0]) for rows in chunks)])
        self.key_C = np.arange(len(chunks), dtype=np.uint64)

    def __len__(self):
        return int(self.start_C[-1])

    def read_chunk(self, chunk, columns):
        self.reads.append(chunk)
        if self.chunks[chunk] is None:
            raise ReadError(f"chunk {chunk} is broken")
        return pa.table({"x": self.chunks[chunk]})

    def where(self, row):
        return f"row {row + 1}"


class Positive(Feature):
    """Rows with a negative number cannot be used."""

    on_invalid = "skip"

    def encode(self, table):
        values = np.array(table["x"].to_pylist(), dtype=np.float32)
        return Encoded(values, (values >= 0).all(1))

    def transform(self, values):
        return values


def sample(table, most=100, skip_failed=True):
    features = [FeatureColumn(["x"], Spec(class_path="Positive"), Positive())]
    return fitting_sample(table, np.arange(len(table)), features, most, 0, skip_failed)


def test_a_sample_for_fitting_has_the_usable_rows_of_the_chunks_that_can_be_read():
    table = Lists([[1.0], [-1.0]], None, [[2.0]], [[3.0], [4.0]])
    (rows,), read = sample(table)
    assert rows.tolist() == [[1], [2], [3], [4]]
    assert set(read) == {0, 2, 3}
    with pytest.raises(ReadError, match="chunk 1 is broken"):
        sample(table, skip_failed=False)


def test_a_sample_for_fitting_ends_when_there_are_enough_rows():
    table = Lists(*([[float(i)], [i + 0.5]] for i in range(100)))
    (rows,), read = sample(table, most=5)
    assert len(read) == 3
    assert rows.ravel().tolist() == [value for i in sorted(read) for value in (i, i + 0.5)]
    assert len(table.reads) < 20


def test_rows_of_an_unusual_width_do_not_count_as_rows_to_fit_on():
    table = Lists([[1.0, 2.0, 3.0]], [[-1.0, 0.0]], [[0.0, -1.0]])
    with pytest.raises(UserError, match="no training row can be read or used"):
        sample(table)
    with pytest.raises(ReadError, match=r"row 1: column 'x': 3 values in a row, expected 2 as in most others"):
        sample(table, skip_failed=False)
