"""Text as features: columns of sentences to token ids, by a Hugging Face tokenizer (the extra `text`)."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mtrain.data.features import Encoded, Feature, OnInvalid, is_text
from mtrain.errors import UserError

TOKENS = "token ids"
PADDING = -1
"""Stands behind the last token of a row: no tokenizer has this id."""
SECOND = 1 << 21
"""Is added to the ids of tokens of the second kind (BERT's token type 1): ids themselves are below, the sum is exact in
float32."""


class Tokens(Feature):
    """One column of text, or two as a pair of sentences, as token ids: a float32 matrix `[n, max_length]`.

    A row holds ids (from 0), `SECOND` added to those of the second sentence where the tokenizer tells them apart, and
    `PADDING` behind the last one. Ids below 2^21 are exact in float32. The trunk `TextEncoder` reads them; it cuts the
    padding off again, so that a generous `max_length` costs memory (4 bytes a token), not time.

    Special tokens are added as the tokenizer does. Longer texts are cut (pairs: the longer one first), and counted in
    `notes`. A row is not valid where the first text is missing, or where a row has no token at all; a missing second text
    leaves the first alone.

    Args:
        tokenizer: name on the hub, a folder, or a file `tokenizer.json`. It must be a fast one.
        max_length: tokens of a row, special ones included.
    """

    cached = True
    encode_options = ("max_length",)  # and the tokenizer itself, not its name: see `version`
    packed = TOKENS
    expected = "text with at least one token"

    def __init__(self, tokenizer: str, max_length: int = 128, on_invalid: OnInvalid = "error"):
        require_transformers("Tokens")
        self.tokenizer, self.max_length, self.on_invalid = tokenizer, max_length, on_invalid
        self._backend = _load(tokenizer)
        least = self._backend.num_special_tokens_to_add(True) + 2
        if not least <= max_length < 1 << 20:
            expected = f"{least} to {(1 << 20) - 1} with this tokenizer; 128 is usual"
            raise UserError(f"Tokens: max_length is {max_length}, expected {expected}")
        self._backend.no_padding()
        self._backend.enable_truncation(max_length)
        self._vocabulary = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        if self._vocabulary > SECOND:
            raise UserError(f"Tokens: tokenizer {tokenizer} has ids up to {self._vocabulary - 1}, expected below {SECOND}")

    def version(self) -> str:
        import tokenizers

        return f"{tokenizers.__version__} {hashlib.sha256(self._backend.to_str().encode()).hexdigest()}"

    def encode(self, table: pa.Table) -> Encoded:
        """Ids [n, max_length], and in a last column whether the text was cut."""
        names = table.column_names
        if len(names) > 2:
            raise UserError(f"Tokens reads one column of text or a pair of them, got {', '.join(names)}; give each its own")
        texts = [_texts(name, table[name]) for name in names]
        there = [text is not None for text in texts[0]]
        pairs = zip(*texts, strict=True) if len(texts) == 2 else ((text,) for text in texts[0])
        given = [(pair[0] or "", pair[1]) if len(pair) == 2 and pair[1] is not None else pair[0] or "" for pair in pairs]
        found = self._backend.encode_batch(given)
        length_N = np.fromiter((len(one.ids) for one in found), np.int64, len(found))
        values = np.full((len(found), self.max_length + 1), PADDING, np.int32)
        values[:, -1] = [bool(one.overflowing) for one in found]
        is_token = np.arange(self.max_length) < length_N[:, None]
        total = int(length_N.sum())
        ids = np.fromiter(chain.from_iterable(one.ids for one in found), np.int32, total)
        if len(names) == 2:
            ids += SECOND * np.fromiter(chain.from_iterable(one.type_ids for one in found), np.int32, total)
        values[:, :-1][is_token] = ids
        return Encoded(values, (length_N > 0) & there)

    def fit(self, values: np.ndarray, columns: list[str]) -> None:
        width = self.max_length
        self.state = {"columns": list(columns), "inputs": width + 1, "width": width, "vocabulary": self._vocabulary}
        if cut := int(values[:, -1].sum()):
            what = f"column{'s' if len(columns) > 1 else ''} {', '.join(columns)}"
            self.notes = [f"{what}: {cut} of {len(values)} training texts have more than {width} tokens and are cut"]

    def transform(self, values: np.ndarray) -> np.ndarray:
        self._check_width(values)
        return np.asarray(values[:, :-1], np.float32)


def _load(name: str) -> Any:
    """The `tokenizers.Tokenizer` of a hub name, folder or file."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts are encoded in several processes or threads already
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    name = located("Tokens: tokenizer", name)
    try:
        if Path(name).is_file():
            return Tokenizer.from_file(name)
        loaded = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of many kinds, for what is not there, not complete or not a tokenizer
        raise UserError(
            f"Tokens: tokenizer '{name}' cannot be loaded ({str(error)[:200]}); expected a hub name, a folder or a "
            "tokenizer.json"
        ) from None
    if not getattr(loaded, "is_fast", False):
        raise UserError(f"Tokens: tokenizer '{name}' has no fast version; save one as tokenizer.json and name that file")
    return loaded.backend_tokenizer


def _texts(name: str, column: pa.ChunkedArray) -> list[str | None]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (is_text(column.type) or pa.types.is_null(column.type)):
        raise UserError(f"column '{name}' has type {column.type}, but Tokens reads text; use another feature for it")
    return column.to_pylist()


def located(what: str, name: str) -> str:
    """A name on the hub as it is, or a path, with `~` for the home folder.

    Raises:
        UserError: what can only be a path is not there.
    """
    path = os.path.expanduser(name)
    if path.startswith(("/", "./", "../")) and not os.path.exists(path):
        raise UserError(f"{what} '{name}': no such file or folder; mend the path, or give a name on the hub")
    return path


def require_transformers(what: str) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f'{what} needs transformers: pip install "mtrain[text]"')
