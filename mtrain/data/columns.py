"""What the values of a column show: its form, and a few figures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrain.data.features import is_number, is_text

Form = Literal["number", "category", "text", "smiles", "list", "date", "other", "empty"]
_TRIED = 100  # texts that are tried as molecules
_DATE = re.compile(r"\d{4}-\d\d?-\d\d?([ T].*)?|\d\d?[/.]\d\d?[/.]\d{4}")
_SMILES = re.compile(r"[A-Za-z0-9@+\-\[\]()\\/%=#$.:*~]+")
_CHEMICAL = re.compile(r"[=#()\[\]]|[a-z]\d|[A-Z]\d|[A-Z][A-Z][A-Z]")
_IDS = re.compile(r"(?i:(^|[\W_])(id|ids|uuid|guid|key|index|idx|rowid|row_number|identifier|cid|inchikey)$)|[a-z]I[dD]$")


@dataclass(frozen=True)
class Column:
    """What its values show.

    form: number (also text of numbers, and bools), category (text with few different values), text (with many), smiles, list,
        date, other (a type without a feature) or empty.
    missing: share of rows.
    distinct: number of different values.
    usual: rows that hold the most frequent one.
    whole, low, high: of numbers: whether all are whole, and their range.
    """

    name: str
    form: Form
    missing: float = 0.0
    distinct: int = 0
    usual: int = 0
    whole: bool = False
    low: float = 0.0
    high: float = 0.0

    @property
    def binary(self) -> bool:
        """Numbers 0 and 1 alone."""
        return self.form == "number" and self.whole and self.low >= 0 and self.high <= 1

    @property
    def plain(self) -> str:
        """Its name in lower case, with one underscore for what is neither letter nor digit."""
        return re.sub(r"[\W_]+", "_", self.name.strip()).lower()

    @property
    def base(self) -> str:
        """The same without an ending: `store` of Store ID."""
        return re.sub(r"(_id|_name|_key)$|(?<=.)id$", "", self.plain)

    @property
    def family(self) -> str:
        """The letters with which its name begins: `x` of x1, `pixel` of pixel_0_1."""
        return re.split(r"[\W\d_]", self.name.strip(), maxsplit=1)[0].lower()

    @property
    def is_id(self) -> bool:
        """Whole numbers or text, named as an id or index."""
        fits = self.form in ("category", "text") or (self.form == "number" and self.whole)
        return fits and bool(_IDS.search(self.name.strip()))


def look(name: str, values: pa.ChunkedArray) -> Column:
    """The form and the figures of a column."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.cast(kind.value_type), kind.value_type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return Column(name, "list", missing=values.null_count / max(len(values), 1))
    if pa.types.is_null(kind):
        return Column(name, "empty", missing=1.0)
    if is_text(kind):
        return _look_at_text(name, values)
    if is_number(kind):
        return _look_at_numbers(name, values if pa.types.is_integer(kind) else pc.cast(values, pa.float64(), safe=False))
    form: Form = "date" if pa.types.is_date(kind) or pa.types.is_timestamp(kind) else "other"
    return Column(name, form, missing=values.null_count / max(len(values), 1))


def _look_at_numbers(name: str, values: pa.ChunkedArray) -> Column:
    known = values.drop_null().to_numpy()
    known = known[~np.isnan(known)]
    if not len(known):
        return Column(name, "empty", missing=1.0)
    found, count = np.unique(known, return_counts=True)
    return Column(
        name,
        "number",
        missing=1 - len(known) / len(values),
        distinct=len(found),
        usual=int(count.max()),
        whole=found.dtype.kind in "iu" or bool((np.abs(found) < 2**63).all() and (found == np.trunc(found)).all()),
        low=float(found[0]),
        high=float(found[-1]),
    )


def _look_at_text(name: str, values: pa.ChunkedArray) -> Column:
    text = pc.utf8_trim_whitespace(values)
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text)
    if text.null_count == len(text):
        return Column(name, "empty", missing=1.0)
    for kind in (pa.int64(), pa.float64()):
        try:
            return _look_at_numbers(name, pc.cast(text, kind))
        except pa.ArrowInvalid:
            pass
    counted = pc.value_counts(text.drop_null())
    distinct, rows = counted.field("values"), len(text) - text.null_count
    tried = distinct.take(np.unique(np.linspace(0, len(distinct) - 1, _TRIED).astype(int))).to_pylist()
    form: Form = "category"
    if _are_molecules(name, tried):
        form = "smiles"
    elif all(_DATE.fullmatch(one) for one in tried):
        form = "date"
    elif len(distinct) > max(20, min(1000, len(text) // 10)):
        form = "text"
    usual = pc.max(counted.field("counts")).as_py()
    return Column(name, form, 1 - rows / len(text), len(distinct), usual)


def _are_molecules(name: str, texts: list[str]) -> bool:
    """Whether RDKit reads nine of ten as molecules (a name with "smiles" helps); without RDKit, whether they look so."""
    named = "smiles" in name.lower()
    looks = [bool(_SMILES.fullmatch(text)) and (named or bool(_CHEMICAL.search(text))) for text in texts]
    if np.mean(looks) < (0.5 if named else 0.8) or (len(texts) < 5 and not named):
        return False
    try:
        from rdkit import Chem, rdBase
    except ImportError:
        return named
    with rdBase.BlockLogs():
        return float(np.mean([Chem.MolFromSmiles(text) is not None for text in texts])) >= 0.9
