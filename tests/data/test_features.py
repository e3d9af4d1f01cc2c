import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from scipy.special import ndtri
from scipy.stats import rankdata
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, OneHotEncoder, QuantileTransformer, StandardScaler

import mtrain
from mtrain.data import FEATURES
from mtrain.data.features import (
    Array,
    Categorical,
    Encoded,
    Feature,
    Numeric,
    encode_categories,
    encode_column,
    infer_feature,
)
from mtrain.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def numeric_table(n=200, missing=0.2, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.lognormal(size=(n, 4)) * [1, 100, 1e-3, 1]
    x[rng.random(x.shape) < missing] = np.nan
    return x, pa.table({f"f{i}": pa.array(x[:, i], from_pandas=True) for i in range(4)})


def fit_transform(feature, table, train=slice(None)):
    values = feature.encode(table).values
    feature.fit(values[train], table.column_names)
    return feature.transform(values)


@pytest.mark.parametrize("impute", ["mean", "median"])
def test_numeric_imputes_and_standardizes_with_training_statistics_as_sklearn_does(impute):
    x, table = numeric_table()
    peer = make_pipeline(SimpleImputer(strategy=impute, add_indicator=False), StandardScaler()).fit(x[:120])
    np.testing.assert_allclose(
        fit_transform(Numeric(impute=impute), table, slice(120)), peer.transform(x), rtol=1e-5, atol=1e-6
    )


def test_numeric_indicator_has_a_column_for_each_column_with_missing_training_values():
    x, table = numeric_table()
    x[:120, 1] = 1.0 + np.arange(120)  # missing only outside training
    table = table.set_column(1, "f1", pa.array(x[:, 1], from_pandas=True))
    peer = SimpleImputer(strategy="median", add_indicator=True).fit(x[:120])
    got = fit_transform(Numeric(standardize=False, indicator=True), table, slice(120))
    assert got.dtype == np.float32
    assert got.shape[1] == 7
    expected = peer.transform(np.where(np.isnan(x) & (np.arange(4) == 1), np.nanmedian(x[:120, 1]), x))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_numeric_log1p_comes_before_standardization_and_clip_after_it():
    x, table = numeric_table(missing=0)
    z = StandardScaler().fit_transform(np.log1p(x))
    np.testing.assert_allclose(
        fit_transform(Numeric(transform="log1p", clip=1.5), table), np.clip(z, -1.5, 1.5), rtol=1e-5, atol=1e-6
    )


def test_numeric_quantile_gives_the_normal_scores_of_mid_ranks_also_for_ties():
    x = np.random.default_rng(0).poisson(1.0, (150, 2)).astype(float)
    got = fit_transform(Numeric(standardize=False, transform="quantile"), pa.table({"a": x[:, 0], "b": x[:, 1]}))
    expected = ndtri((np.stack([rankdata(c) for c in x.T], 1) - 0.5) / 150)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_numeric_quantile_on_many_rows_is_close_to_sklearns_and_bounded_outside_training():
    x, _ = numeric_table(5000, missing=0)
    feature = Numeric(standardize=False, transform="quantile")
    got = fit_transform(feature, pa.table({"a": x[:, 0]}))[:, 0]
    peer = QuantileTransformer(output_distribution="normal", n_quantiles=1000, subsample=None).fit_transform(x[:, :1])
    inside = np.abs(got) < 2
    np.testing.assert_allclose(got[inside], peer[inside, 0], atol=0.02)
    far = feature.transform(np.array([[-1e30], [1e30]]))
    np.testing.assert_allclose(far[:, 0], [ndtri(0.5 / 5000), ndtri(1 - 0.5 / 5000)], rtol=1e-5)


def test_numeric_drops_columns_that_are_constant_or_empty_in_training_and_says_so():
    table = pa.table({"a": [1.0, 2.0, 3.0, 4.0], "b": [7, 7, 7, 8], "c": pa.array([None, None, None, 1.0]), "d": [1] * 4})
    feature = Numeric(indicator=True)
    got = fit_transform(feature, table, slice(3))
    assert got.shape == (4, 1) == (4, feature.width)
    assert list(feature.notes) == ["dropped constant columns 'b', 'd'", "dropped all-missing column 'c'"]
    with pytest.raises(UserError, match="column 'd': the same value"):
        fit_transform(Numeric(), table.select(["d"]))


def test_numeric_reads_integers_bools_decimals_dictionaries_and_text_numbers():
    columns = {
        "i": pa.array([1, None, 3]),
        "b": pa.array([True, False, None]),
        "h": pa.array([1.5, 2, 3], pa.float16()),
        "d": pa.array([1, 2, 3]).cast(pa.decimal128(22, 2)),
        "t": pa.array(["1", "2.5", None]),
        "k": pa.array([5.0, None, 5.0]).dictionary_encode(),
    }
    values = Numeric().encode(pa.table(columns)).values
    nan = np.nan
    np.testing.assert_array_equal(values, np.array([[1, 1, 1.5, 1, 1, 5], [nan, 0, 2, 2, 2.5, nan], [3, nan, 3, 3, nan, 5]]))


def test_numeric_keeps_small_types_in_float32_and_large_integers_exact():
    assert Numeric().encode(pa.table({"a": pa.array([1, 2], pa.int16())})).values.dtype == np.float32
    big = 2**53 - 1
    assert Numeric().encode(pa.table({"a": [big]})).values[0, 0] == big


@pytest.mark.parametrize(
    ("feature", "column", "message"),
    [
        (Numeric(), [1.0, np.inf], "column 'x', row 2: found inf"),
        (Numeric(), [1.0, 1e300], r"column 'x', row 2: found 1e\+300"),
        (Numeric(impute="error"), [1.0, 2.0, None], "column 'x', row 3: missing value"),
        (Numeric(transform="log1p"), [1.0, -1.0], "column 'x', row 2: found -1, expected a number above -1"),
        (Numeric(), ["1", None, "n/a"], "column 'x', row 3: found text 'n/a', expected a number"),
        (Numeric(), [[1.0]], "use the feature Array"),
        (Array(), [1.0], "expected lists of numbers"),
        (Array(), [["a"]], "expected lists of numbers"),
        (Array(), [[1.0, 2.0], [1.0]], "column 'x', row 2: a list of 1, expected 2 as in row 1"),
        (Array(), [[1.0, 2.0], None], "column 'x', row 2: missing value"),
        (Array(), [[1.0, 2.0], [0.0, None]], "column 'x', row 2: missing value"),
        (Array(), [[1.0, 2.0], [0.0, np.nan]], "column 'x', row 2: found nan at position 2"),
        (Array(), [[[1, 2], [3, 4]], [[1, 2], [3]]], "column 'x', row 2: a list of 1, expected 2"),
        (Array(), [[], []], "column 'x', row 1: an empty list"),
        (Categorical(), [1.0, 1.5], "column 'x', row 2: found 1.5"),
        (Categorical(), [[1]], "expected text, whole numbers or bools"),
    ],
)
def test_bad_values_are_refused_in_one_line_that_names_column_and_row(feature, column, message):
    with pytest.raises(UserError, match=message):
        feature.encode(pa.table({"x": column}))


@pytest.mark.parametrize("make", [lambda: Numeric(clip=-1), lambda: Categorical(max_categories=0)])
def test_options_out_of_range_are_refused(make):
    with pytest.raises(UserError, match="expected"):
        make()


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 3)])
def test_array_flattens_lists_over_chunks_and_slices(kind):
    x = np.arange(30, dtype=float).reshape(10, 3)
    column = pa.chunked_array([pa.array(x[:4].tolist(), kind), pa.array(x[2:].tolist(), kind).slice(2)])
    np.testing.assert_array_equal(Array().encode(pa.table({"x": column})).values, x)


def test_array_flattens_array2d_of_datasets_and_nested_lists():
    x = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    ds = datasets.Dataset.from_dict({"x": x.tolist()}, features=datasets.Features({"x": datasets.Array2D((2, 3), "float32")}))
    np.testing.assert_array_equal(encode_column(ds.with_format("arrow")[:], ["x"], Array()).values, x.reshape(4, 6))
    np.testing.assert_array_equal(Array().encode(pa.table({"x": x.tolist()})).values, x.reshape(4, 6))


def test_array_normalizes_rows_then_standardizes_positions_as_sklearn_does():
    x = np.random.default_rng(0).normal(size=(50, 4))
    x[3], x[:, 2] = 0, np.where(np.arange(50) == 3, 0, x[:, 2])
    table = pa.table({"x": x.tolist()})
    peer = make_pipeline(Normalizer(), StandardScaler())
    got = fit_transform(Array(standardize=True, normalize="l2"), table)
    np.testing.assert_allclose(got, peer.fit_transform(x), rtol=1e-5, atol=1e-6)


def test_array_keeps_a_constant_position_as_zero():
    feature = Array(standardize=True)
    got = fit_transform(feature, pa.table({"x": [[1, 5], [3, 5]]}))
    np.testing.assert_array_equal(got, [[-1, 0], [1, 0]])
    assert list(feature.notes) == ["column 'x': 1 of 2 positions are constant in training"]


def test_array_of_another_length_than_in_training_is_refused():
    feature = Array()
    fit_transform(feature, pa.table({"x": [[1, 5], [3, 5]]}))
    with pytest.raises(UserError, match="3 values in a row, expected 2"):
        feature.transform(np.zeros((1, 3)))


def test_categorical_is_sklearns_one_hot_with_zeros_for_the_unseen():
    rng = np.random.default_rng(0)
    city, size = rng.choice(list("abcde"), 100), rng.integers(0, 4, 100)
    city[80:] = "z"
    peer = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(np.stack([city, size.astype(str)], 1)[:80])
    got = fit_transform(Categorical(), pa.table({"city": city, "size": size}), slice(80))
    np.testing.assert_array_equal(got, peer.transform(np.stack([city, size.astype(str)], 1)))


def test_categorical_has_a_column_other_only_if_training_rows_fall_in_it():
    column = pa.array(["a", "b", "a", "b", "rare", None, "unseen", None])
    rare = Categorical(min_count=2)
    got = fit_transform(rare, pa.table({"x": column}), slice(5))
    np.testing.assert_array_equal(got.argmax(1), [0, 1, 0, 1, 2, 2, 2, 2])
    assert rare.notes == ["rare categories share the category 'other': x (1 of 3 categories, 1 of 5 rows)"]
    fit_transform(rare, pa.table({"x": column}), slice(6))
    assert rare.notes == ["rare categories and missing values share the category 'other': x (1 of 3 categories, 2 of 6 rows)"]
    own = Categorical()
    missing = fit_transform(own, pa.table({"x": column, "full": ["a", "b"] * 4, "y": column}), slice(6))
    assert own.notes == ["missing values are a category of their own: x (1 of 6), y (1 of 6)"]
    missing = missing[:, :4]
    np.testing.assert_array_equal(missing[6], [0, 0, 0, 1])
    capped = fit_transform(Categorical(max_categories=1), pa.table({"x": column}), slice(4))
    np.testing.assert_array_equal(capped, [[1, 0], [0, 1], [1, 0], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1]])


def test_categorical_reads_bools_dictionaries_and_whole_floats_with_missing_values():
    table = pa.table(
        {"b": [True, False, None], "d": pa.array(["x", "y", "x"]).dictionary_encode(), "f": [1.0, float("nan"), 2.0]}
    )
    assert Categorical().encode(table).values.tolist() == [["true", "x", "1"], ["false", "y", None], [None, "x", "2"]]


def test_categorical_drops_a_column_with_one_category():
    feature = Categorical()
    assert fit_transform(feature, pa.table({"a": ["x", "x"], "b": ["p", "q"]})).shape == (2, 2)
    assert feature.notes == ["dropped constant column 'a'"]
    with pytest.raises(UserError, match="column 'a'"):
        fit_transform(Categorical(), pa.table({"a": ["x", "x"]}))


@pytest.mark.parametrize(
    ("make", "table"),
    [
        (lambda: Numeric(indicator=True, transform="quantile"), numeric_table()[1]),
        (lambda: Array(standardize=True), pa.table({"x": [[1.0, 0.1], [3.0, 0.7], [4.0, 0.9]]})),
        (lambda: Categorical(min_count=2), pa.table({"x": ["a", "b", "a", "b", "c"], "y": [1, 2, 3, 3, 1]})),
    ],
)
def test_state_survives_json_exactly(make, table):
    feature = make()
    expected = fit_transform(feature, table)
    again = make()
    again.load_state_dict(json.loads(json.dumps(feature.state_dict(), allow_nan=False)))
    np.testing.assert_array_equal(again.transform(feature.encode(table).values), expected)
    assert again.width == expected.shape[1]


def test_fit_does_not_see_rows_outside_training():
    x, table = numeric_table()
    other = pa.table({name: pa.array(np.r_[x[:120, i], x[120:, i] * 1e6]) for i, name in enumerate(table.column_names)})
    a, b = (fit_transform(Numeric(), t, slice(120)) for t in (table, other))
    np.testing.assert_array_equal(a[:120], b[:120])


def test_every_option_is_typed_and_has_a_default_but_for_the_tokenizer():
    for kind in FEATURES.values():
        for name, parameter in inspect.signature(kind, eval_str=True).parameters.items():
            assert parameter.annotation is not parameter.empty
            assert (parameter.default is parameter.empty) == (name == "tokenizer")


def test_categories_are_numbered_by_first_appearance_and_missing_is_minus_one():
    codes, names = encode_categories(pa.chunked_array([["b", None], ["a", "b"]]))
    assert codes.tolist() == [0, -1, 1, 0]
    assert names.to_pylist() == ["b", "a"]
    unused = pa.DictionaryArray.from_arrays([1, 1], ["never", "x"])
    assert encode_categories(unused)[1].to_pylist() == ["x"]


class Slow(Feature):
    """Its calls are counted in a file, so that other processes count too."""

    cached = True
    encode_options = ("factor",)

    def __init__(self, log: str, factor: float = 1.0):
        self.log, self.factor = log, factor

    def encode(self, table):
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()} {table.num_rows}\n")
        x = pc.utf8_length(pc.fill_null(table.column(0), "")).to_numpy() * np.float32(self.factor)
        return Encoded(np.stack([x, x + 1], 1), table.column(0).is_valid().to_numpy())


def calls(path):
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_cached_feature_is_computed_once_for_each_distinct_value(tmp_path, num_proc):
    log = tmp_path / "log"
    texts = ["x" * (i % 300) if i % 7 else None for i in range(3000)]
    texts[5] = "y"
    ds = datasets.Dataset.from_dict({"t": texts, "other": list(range(3000))})
    feature = Slow(str(log), 2.0)
    feature.on_invalid = "skip"
    encoded = encode_column(ds.with_format("arrow")[:], ["t"], feature, num_proc)
    np.testing.assert_array_equal(encoded.valid, [t is not None for t in texts])
    expected = np.array([2.0 * len(t or "") for t in texts])
    np.testing.assert_array_equal(encoded.values, np.stack([expected, expected + 1], 1))
    first = calls(log)
    assert sum(int(rows) for _, rows in first) == len(set(texts))
    assert len({pid for pid, _ in first}) == num_proc
    # another number of processes reads the same cache
    again = encode_column(ds.with_format("arrow")[:], ["t"], feature, 3 - num_proc)
    np.testing.assert_array_equal(again.values, encoded.values)
    assert calls(log) == first
    other = Slow(str(log), 3.0)
    other.on_invalid = "skip"
    assert encode_column(ds.with_format("arrow")[:], ["t"], other).values[1, 0] == 3.0
    assert len(calls(log)) > len(first)


def test_bits_beyond_the_last_row_do_not_change_the_key_of_the_cache(tmp_path):
    """Arrow leaves them as the memory held them."""
    log = tmp_path / "log"
    feature = Slow(str(log))
    feature.on_invalid = "skip"
    clean = pa.array(["a", None, "b", "c", "d"])
    (bitmap,) = clean.buffers()[0].to_pybytes()[:1]
    for unused_bits in (0b000, 0b101, 0b111):
        validity = pa.py_buffer(bytes([bitmap & 0b11111 | unused_bits << 5]))
        column = pa.Array.from_buffers(clean.type, 5, [validity, *clean.buffers()[1:]])
        encode_column(pa.table({"t": column}), ["t"], feature)
    assert len(calls(log)) == 1


def test_a_new_process_reads_the_cache_of_an_earlier_one(tmp_path):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import sys
            import datasets, numpy as np, pyarrow.compute as pc
            from mtrain.data.features import Encoded, Feature, encode_column

            class Mine(Feature):
                cached = True
                def __init__(self, per: float = 1.0):
                    self.per = per
                def encode(self, table):
                    print("computed")
                    x = pc.utf8_length(table.column(0)).to_numpy().astype(np.float32)[:, None] / self.per
                    return Encoded(x, np.ones(len(x), bool))

            if __name__ == "__main__":
                datasets.disable_progress_bars()
                ds = datasets.Dataset.from_dict({"t": ["a", "bb", "a", "ccc"]})
                print(encode_column(ds.with_format("arrow")[:], ["t"], Mine(float(sys.argv[1]))).values.ravel().tolist())
            """
        )
    )

    def run(per):
        root = str(Path(mtrain.__file__).parents[1])
        env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "shared"), "PYTHONPATH": root}
        done = subprocess.run([sys.executable, tmp_path / "mine.py", per], env=env, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split("\n")[:-1]

    assert run("1") == ["computed", "[1.0, 2.0, 1.0, 3.0]"]
    assert run("1") == ["[1.0, 2.0, 1.0, 3.0]"]
    assert run("2") == ["computed", "[0.5, 1.0, 0.5, 1.5]"]
    source = tmp_path / "mine.py"
    source.write_text(source.read_text().replace("/ self.per", "* self.per"))
    assert run("2") == ["computed", "[2.0, 4.0, 2.0, 6.0]"]


def test_a_view_of_a_data_set_is_encoded_in_its_own_order():
    ds = datasets.Dataset.from_dict({"x": [1.0, 2.0, 3.0]}).select([2, 0])
    np.testing.assert_array_equal(encode_column(ds.with_format("arrow")[:], ["x"], Numeric()).values, [[3], [1]])


def test_an_unusable_row_a_missing_column_and_an_empty_table_are_refused(tmp_path):
    ds = datasets.Dataset.from_dict({"text": ["a", None, "b", None]})
    with pytest.raises(UserError, match=r"column 'text', row 2: found '', expected a usable value \(2 such rows in 4\)"):
        encode_column(ds.with_format("arrow")[:], ["text"], Slow(str(tmp_path / "log")))
    with pytest.raises(UserError, match="no column 'txt' in the data; did you mean 'text'"):
        encode_column(ds.with_format("arrow")[:], ["txt"], Numeric())
    with pytest.raises(UserError, match="no rows"):
        encode_column(ds.with_format("arrow")[:].slice(0, 0), ["text"], Numeric())


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("a", [1.0, 2.0], "Numeric"),
        ("a", [True, False], "Numeric"),
        ("a", [[1.0], [2.0]], "Array"),
        ("Canonical_SMILES", ["C", "CC"], "ECFP"),
        ("a", ["x", "y", "x"], "Categorical"),
        ("a", pa.array(["x", "y"]).dictionary_encode(), "Categorical"),
    ],
)
def test_a_feature_is_inferred_from_type_name_and_values(name, values, kind):
    column = pa.array(values) if isinstance(values, list) else values
    assert infer_feature(pa.field(name, column.type), column).class_path == kind


@pytest.mark.parametrize(
    "column", [pa.array([str(i) for i in range(100)]), pa.array([0]).cast(pa.timestamp("s")), pa.array([{"a": 1}])]
)
def test_a_column_whose_feature_cannot_be_inferred_asks_for_one(column):
    with pytest.raises(UserError, match=r"column 'notes' .*inputs: {notes: Categorical}"):
        infer_feature(pa.field("notes", column.type), column)
