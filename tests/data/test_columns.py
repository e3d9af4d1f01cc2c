"""What the values of a column show."""

import pyarrow as pa
import pytest
from frames import SMILES

from mtrain.data.columns import Column, look


def test_a_column_is_looked_at_by_its_values():
    def form(values, name="c"):
        return look(name, pa.chunked_array([pa.array(values)])).form

    assert form([1, 2, None]) == "number"
    assert form(["1", " 2.5", ""]) == "number"
    assert form(["a", "b", "a"]) == "category"
    assert form([f"text {i}" for i in range(100)]) == "text"
    assert form(["2020-01-02", "2021-3-4"]) == "date"
    assert form([[1.0, 2.0], [3.0, 4.0]]) == "list"
    assert form([None, None]) == "empty"
    assert form(["", " "]) == "empty"
    assert form([{"a": 1}]) == "other"
    column = look("c", pa.chunked_array([pa.array([0.0, 1.0, 1.0, None, float("nan")])]))
    assert (column.missing, column.distinct, column.usual, column.binary) == (pytest.approx(0.4), 2, 2, True)


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64(), pa.string(), pa.float64()])
def test_large_whole_numbers_are_whole_and_told_apart_as_far_as_their_type_can(kind):
    step = 1 if kind != pa.float64() else 256  # between two of its values there
    values = [*range(2**60, 2**60 + 50 * step, step), 2**60, None]
    column = look("tweet_id", pa.chunked_array([pa.array(values, pa.int64()).cast(kind, safe=False)]))
    assert (column.form, column.whole, column.is_id) == ("number", True, True)
    assert (column.distinct, column.usual, column.missing) == (50, 2, pytest.approx(1 / 52))


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (pa.date32(), "date"),
        (pa.date64(), "date"),
        (pa.timestamp("us", "UTC"), "date"),
        (pa.time32("s"), "other"),
        (pa.time64("ns"), "other"),
        (pa.duration("s"), "other"),
    ],
)
def test_days_and_moments_are_dates_but_times_of_day_and_durations_are_not(kind, form):
    assert look("c", pa.chunked_array([pa.array([0, None, 86_400], kind)])).form == form


def test_molecules_are_found_by_reading_them_whatever_their_column_is_called():
    pytest.importorskip("rdkit")
    assert look("structure", pa.chunked_array([SMILES])).form == "smiles"
    assert look("structure", pa.chunked_array([["No", "Yes", "CON", "Nice", "Bonn", "Oslo"]])).form == "category"
    assert look("element", pa.chunked_array([["C", "N", "O", "F", "Cl", "Br"]])).form == "category"
    assert look("smiles", pa.chunked_array([["C", "N", "O"]])).form == "smiles"


@pytest.mark.parametrize(
    ("name", "plain", "base", "family", "is_id"),
    [
        ("Store ID", "store_id", "store", "store", True),
        ("userID", "userid", "user", "userid", True),
        ("taskid", "taskid", "task", "taskid", False),
        ("pixel_0_1", "pixel_0_1", "pixel_0_1", "pixel", False),
        ("x12", "x12", "x12", "x", False),
        (" NR-AR ", "nr_ar", "nr_ar", "nr", False),
        ("acid", "acid", "ac", "acid", False),
        ("index", "index", "index", "index", True),
    ],
)
def test_names_are_read_in_plain_letters(name, plain, base, family, is_id):
    column = Column(name, "number", whole=True)
    assert (column.plain, column.base, column.family, column.is_id) == (plain, base, family, is_id)
    assert not Column(name, "number", whole=False).is_id
