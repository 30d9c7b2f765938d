"""Data files as people have them: rows of JSON lines, a JSON array, CSV or Parquet, compressed or not.

What a file is follows from its content; only CSV from its name. Not supported: encodings other than UTF-8, UTF-16 and
UTF-32, which are named and refused.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from decimal import Decimal
from pathlib import Path
from typing import Any

from forerun.errors import UserError

Row = dict[str, Any]
COMPRESSED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\0": lzma.decompress}
REFUSED = {
    b"PK\3\4": "a ZIP archive; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it: zstd -d",
    b"version https://git-lfs": "a pointer of Git LFS and not the data; get them: git lfs pull",
}
LARGEST_EXPONENT = 400  # of a number that is written out in digits


class Number(float):
    """A JSON number with a point or an exponent, which keeps its own text."""

    text: str

    def __new__(cls, text: str) -> Number:
        number = super().__new__(cls, text)
        number.text = str(text)
        return number


def read_rows(path: str) -> list[Row]:
    """The rows of a data file.

    Raises UserError when the file is missing, empty or broken, or of a format or encoding that is not read.
    """
    data = _bytes(path)
    if data.startswith(b"PAR1"):
        rows = _parquet(data, path)
    elif {".csv", ".tsv"} & set(Path(path.lower()).suffixes):
        rows = _csv(_text(data, path), path)
    else:
        rows = _json(_text(data, path), path)
    if not rows:
        raise UserError(f"The data file {path} is empty; it needs one JSON object per line")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"Row {number} of {path} holds {type(row).__name__}, not an object")
    return rows


def number_text(value: float | int) -> str:
    """A number as it was written, without exponent: 1e-05 is 0.00001."""
    text = value.text if isinstance(value, Number) else str(value)
    if not isinstance(value, float):
        return text
    number = Decimal(text)
    return format(number, "f") if abs(number.adjusted()) < LARGEST_EXPONENT else text


def _bytes(path: str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the data file {path}: {error.strerror}") from None
    for start, what in REFUSED.items():
        if data.startswith(start):
            raise UserError(f"The data file {path} is {what}")
    for start, unpack in COMPRESSED.items():
        if data.startswith(start):
            try:
                return unpack(data)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise UserError(f"The data file {path} cannot be unpacked: {error}") from None
    return data


def _text(data: bytes, path: str) -> str:
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise UserError(
            f"The data file {path} is not {encoding.upper().removesuffix('-SIG')} text: {byte}; if it is Latin-1 "
            f"(ISO 8859-1), convert it: iconv -f LATIN1 -t UTF-8 {path} > utf8.jsonl"
        ) from None


def _parquet(data: bytes, path: str) -> list[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(pyarrow.BufferReader(data))
    except pyarrow.ArrowException as error:
        raise UserError(f"The Parquet file {path} cannot be read: {str(error).splitlines()[0]}") from None
    for index, column in enumerate(table.schema):
        if pyarrow.types.is_float32(column.type):  # 0.1 would become 0.10000000149011612
            text = table[index].cast(pyarrow.string())
            table = table.set_column(index, column.name, text.cast(pyarrow.float64()))
    return table.to_pylist()


def _csv(text: str, path: str) -> list[Any]:
    delimiter = "\t" if ".tsv" in path.lower() else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows: list[Any] = list(reader)
    except csv.Error as error:
        raise UserError(f"The CSV file {path} cannot be read: {error}") from None
    names = [name for name in reader.fieldnames or () if name]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"The CSV file {path} has two columns called '{twice[0]}'; rename one")
    return rows


def _json(text: str, path: str) -> list[Any]:
    if text.lstrip().startswith("["):
        rows: list[Any] = _parsed(text, f"The JSON array in {path}")
        return rows
    lines = enumerate(text.split("\n"), 1)  # `splitlines` would also cut at U+2028 and others inside of strings
    return [_parsed(line, f"Line {number} of {path}") for number, line in lines if line.strip()]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_float=Number)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply to be read") from None
    except ValueError:  # Python reads whole numbers of at most 4,300 digits
        raise UserError(f"{where} has a number of more than 4300 digits; write it as text, in quotes") from None
