"""Text columns to token ids."""

import shutil

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from mtrain.data.features import encode_column
from mtrain.data.tokens import PADDING, SECOND, Tokens
from mtrain.errors import UserError

WORDS = "the house by the river has a blue door and a red roof"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A word-level tokenizer with BERT's template, whose words are those of one sentence."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([WORDS], trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"]))
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture
def ids(path):
    return Tokenizer.from_file(path).token_to_id


def fitted(path, table, **options):
    feature = Tokens(path, **options)
    encoded = encode_column(table, table.column_names, feature)
    feature.fit(encoded.values, table.column_names)
    return feature, feature.transform(encoded.values), encoded.valid


def test_a_text_is_its_ids_padded_to_one_width(path, ids):
    table = pa.table({"text": ["The blue house", "roof unknown"]})
    feature, x, valid = fitted(path, table, max_length=8)
    expected = np.full((2, 8), PADDING, np.float32)
    expected[0, :5] = [2, ids("the"), ids("blue"), ids("house"), 3]
    expected[1, :4] = [2, ids("roof"), 1, 3]
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, expected)
    assert feature.width == 8
    assert valid.all()
    assert feature.state["vocabulary"] == 15
    assert not feature.notes


def test_the_second_sentence_of_a_pair_is_told_apart_and_may_be_missing(path, ids):
    table = pa.table({"a": ["red", "red"], "b": ["blue door", None]})
    _, x, valid = fitted(path, table, max_length=8)
    second = [ids("blue") + SECOND, ids("door") + SECOND, 3 + SECOND]
    assert x[0].tolist() == [2, ids("red"), 3, *second, PADDING, PADDING]
    assert x[1].tolist() == [2, ids("red"), 3, *[PADDING] * 5]
    assert valid.all()


def test_long_texts_are_cut_at_the_end_token_and_counted(path, ids):
    feature, x, _ = fitted(path, pa.table({"text": [WORDS, "a door", WORDS + " " + WORDS]}), max_length=6)
    assert x[0].tolist() == [2, ids("the"), ids("house"), ids("by"), ids("the"), 3]
    assert x[2].tolist() == x[0].tolist()
    assert feature.notes == ["column text: 2 of 3 training texts have more than 6 tokens and are cut"]


def test_a_missing_text_is_refused_or_left_out(path):
    table = pa.table({"text": ["a", None, ""]})
    with pytest.raises(UserError, match=r"column 'text', row 2: found '', expected text with at least one token"):
        fitted(path, table)
    _, x, valid = fitted(path, table, on_invalid="skip")
    assert valid.tolist() == [True, False, True]
    assert x[2, :3].tolist() == [2, 3, PADDING]


def test_the_cache_follows_the_tokenizer_and_not_its_name(path, tmp_path):
    other = Tokenizer.from_file(path)
    other.add_tokens(["unheard"])
    copy, grown = tmp_path / "copy.json", tmp_path / "grown.json"
    shutil.copy(path, copy)
    other.save(str(grown))
    assert Tokens(path).version() == Tokens(str(copy)).version()
    assert Tokens(path).version() != Tokens(str(grown)).version()


def test_a_saved_folder_is_read_as_its_file(path, tmp_path):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=path, pad_token="[PAD]").save_pretrained(tmp_path)
    table = pa.table({"text": pa.array(["a red door", "a red door"]).dictionary_encode()})
    np.testing.assert_array_equal(fitted(path, table)[1], fitted(str(tmp_path), table)[1])


def test_bad_options_and_columns_are_said_in_one_line(path):
    for length in (4, 1 << 20):
        with pytest.raises(UserError, match=rf"max_length is {length}, expected 5 to 1048575 with this tokenizer"):
            Tokens(path, max_length=length)
    with pytest.raises(
        UserError, match=r"tokenizer 'no/such' cannot be loaded \(.*expected a hub name, a folder or a tokenizer.json"
    ):
        Tokens("no/such")
    with pytest.raises(UserError, match=r"column 'n' has type int64, but Tokens reads text"):
        fitted(path, pa.table({"n": [1, 2]}))
    three = pa.table({name: ["a"] for name in "abc"})
    with pytest.raises(UserError, match=r"Tokens reads one column of text or a pair of them, got a, b, c"):
        fitted(path, three)


def test_a_missing_package_names_its_extra(path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'Tokens needs transformers: pip install "mtrain\[text\]"'):
        Tokens(path)


def test_a_path_may_begin_with_the_home_folder_and_must_be_there(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(path, tmp_path / "own.json")
    assert Tokens("~/own.json").version() == Tokens(path).version()
    for gone in ("~/gone.json", str(tmp_path / "gone"), "./gone"):
        with pytest.raises(UserError, match=rf"Tokens: tokenizer '{gone}': no such file or folder; mend the path"):
            Tokens(gone)
