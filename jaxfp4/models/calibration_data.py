"""Calibration data: rows of tokens from files of text or tokens, or from any iterable, read only as far as needed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxfp4.models.text_tokenizer import TextTokenizer

Tokens = NDArray[np.int32]
SAMPLES, SEQUENCE_LENGTH, BATCH_SIZE = 512, 512, 8
FIELDS = ("text", "messages", "input_ids")
_PIECE = 1 << 18
"""Characters of a text file that are tokenized at a time."""
_LONGEST_LINE = 4 * _PIECE
_OTHER_FILES = (".json", ".parquet", ".arrow", ".gz", ".zst", ".xz", ".bz2", ".zip", ".npz", ".pkl", ".pt")


@dataclasses.dataclass(frozen=True)
class CalibrationData:
    """Batches of int32 tokens `[batch, time]`, which `jaxfp4.calibrate` takes as they are."""

    batches: tuple[Tokens, ...]
    wanted: int
    """How many rows were asked for."""

    @property
    def rows(self) -> int:
        """How many there are: fewer than `wanted` where the source has no more."""
        return sum(len(batch) for batch in self.batches)

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return sum(batch.size for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tokens]:
        return iter(self.batches)

    def __str__(self) -> str:
        lengths = sorted({batch.shape[1] for batch in self.batches})
        length = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        asked = f", all that there are of the {self.wanted:,} asked for" if self.rows < self.wanted else ""
        return f"{self.rows:,} rows of {length} tokens{asked}"


def read_calibration_data(
    source: str | os.PathLike[str] | Iterable[Any],
    *,
    vocabulary: int,
    tokenizer: TextTokenizer | None = None,
    sequence_length: int | None = None,
    default_length: int = SEQUENCE_LENGTH,
    samples: int = SAMPLES,
    batch_size: int = BATCH_SIZE,
    field: str | None = None,
) -> CalibrationData:
    """The first `samples` rows of `token_rows`, in batches; the last batch, or one of another length, may be smaller.

    The same arguments give the same batches. Where the source has fewer rows, all of them; `.rows` says how many.

    Raises what `token_rows` does, and ValueError if there is not one row, or for a number below 1.
    """
    given = {"sequence_length": sequence_length, "samples": samples, "batch_size": batch_size}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: wanted at least 1")
    rows = token_rows(
        source,
        vocabulary=vocabulary,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        default_length=default_length,
        field=field,
    )
    batches = tuple(token_batches(itertools.islice(rows, samples), batch_size))
    if not batches:
        raise ValueError(
            f"{_name(source)}: not one row of {sequence_length or default_length} tokens: wanted more text or tokens, "
            "or a shorter sequence_length (--sequence-length)"
        )
    return CalibrationData(batches, samples)


def token_batches(rows: Iterable[Tokens], batch_size: int = BATCH_SIZE) -> Iterator[Tokens]:
    """Rows of equal lengths stacked to int32 `[batch, time]`, lazily.

    >>> [batch.shape for batch in token_batches(np.zeros((5, 16), np.int32), 2)]
    [(2, 16), (2, 16), (1, 16)]
    """
    for _, alike in itertools.groupby(rows, len):
        while chosen := list(itertools.islice(alike, batch_size)):
            yield np.stack(chosen)


def token_rows(
    source: str | os.PathLike[str] | Iterable[Any],
    *,
    vocabulary: int,
    tokenizer: TextTokenizer | None = None,
    sequence_length: int | None = None,
    default_length: int = SEQUENCE_LENGTH,
    field: str | None = None,
) -> Iterator[Tokens]:
    """Rows of int32 tokens `[time]`, lazily and in the order of the source, of which no more is read than is asked for.

    Documents are packed: joined, with the tokenizer's separator in between, and cut into rows of `sequence_length`;
    what is left at the end is dropped. Arrays of rows are not: each row is one already.

    Args:
        source: a file, by its suffix: `.npy` an array of integers, memory-mapped, `[rows, time]` or a stream `[time]`;
            `.jsonl` one JSON object a line, each a document; anything else UTF-8 text, one document. Or an iterable of
            documents: strings, lists of tokens, mappings as in `.jsonl`, or arrays as in `.npy`.
        vocabulary: how many tokens the model has.
        tokenizer: for text; `load_tokenizer(model_dir)`, or `byte_tokenizer()` for a byte-level model.
        sequence_length: tokens a row. Longer rows of an array are cut to their first so many; shorter ones stay.
        default_length: tokens a row if `sequence_length` is not given; rows of an array are then left whole.
        field: what in a JSON object is the document: text, a list of tokens, or messages whose contents are joined by
            blank lines (no chat template is applied). By default the first it has of `text`, `messages`, `input_ids`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, the message with its line; there is text and no tokenizer; tokens are outside
            the vocabulary; the source is none of these.
    """
    packer = _Packer(vocabulary, sequence_length or default_length, None if tokenizer is None else tokenizer.separator)
    for place, document in _documents(source, field):
        if isinstance(document, np.ndarray) and document.ndim == 2:
            for i, row in enumerate(document):
                yield packer.checked(row[:sequence_length], f"{place}, row {i + 1}")
        elif isinstance(document, _Text):
            yield from packer.packed(_encoded(document, tokenizer, place), place)
        else:
            yield from packer.packed(iter([document]), place)


@dataclasses.dataclass(frozen=True)
class _Text:
    """A document of text in pieces."""

    pieces: Iterable[str]


class _Packer:
    """Tokens that wait to become rows."""

    def __init__(self, vocabulary: int, length: int, separator: int | None):
        self._vocabulary, self._length, self._separator = vocabulary, length, separator
        self._waiting: Tokens = np.empty(0, np.int32)
        self._is_first = True

    def packed(self, pieces: Iterator[Any], place: str) -> Iterator[Tokens]:
        """The rows that are full with one document more, in pieces."""
        separator = [] if self._separator is None or self._is_first else [self._separator]
        for piece in itertools.chain([separator] if separator else [], pieces):
            self._is_first = False
            # One part of a long array at a time, so that a memory-mapped one stays on disk.
            for start in range(0, len(piece), _PIECE):
                tokens = self.checked(piece[start : start + _PIECE], place)
                waiting = np.concatenate([self._waiting, tokens])
                full = len(waiting) // self._length * self._length
                self._waiting = waiting[full:]
                yield from waiting[:full].reshape(-1, self._length)

    def checked(self, tokens: Any, place: str) -> Tokens:
        """The tokens as int32; ValueError unless they are in the vocabulary."""
        array = np.asarray(tokens)
        if array.size and (array.min() < 0 or array.max() >= self._vocabulary):
            raise ValueError(
                f"{place}: tokens from {array.min()} to {array.max()}; wanted 0 to {self._vocabulary - 1}, the model's "
                "vocabulary; tokenize with the model's own tokenizer"
            )
        return array.astype(np.int32)


def _encoded(text: _Text, tokenizer: TextTokenizer | None, place: str) -> Iterator[Sequence[int]]:
    if tokenizer is None:
        raise ValueError(
            f"{place}: text: wanted a tokenizer; pass tokenizer=load_tokenizer(model_dir), or tokens instead of text"
        )
    encode = tokenizer.encode
    for piece in text.pieces:
        try:
            yield encode(piece)
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: found bytes that are no UTF-8 text ({error.reason}): wanted text") from error
        encode = tokenizer.encode_more


def _documents(source: Any, field: str | None) -> Iterator[tuple[str, Any]]:
    """Documents with the place they are at: `_Text`, lists of tokens, or arrays."""
    if isinstance(source, str | os.PathLike):
        yield from _file_documents(Path(source), field)
        return
    if isinstance(source, np.ndarray):
        yield "tokens", _array(source, "tokens")
        return
    if not isinstance(source, Iterable):
        raise ValueError(f"calibration data of type {type(source).__name__}: wanted a file, an array, or an iterable")
    for i, document in enumerate(source):
        yield f"document {i + 1}", _document(document, field, f"document {i + 1}")


def _file_documents(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: wanted .npy, .jsonl or text; correct the name")
    if path.suffix == ".npy":
        yield str(path), _mapped(path)
    elif path.suffix == ".jsonl":
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                place = f"{path}, line {number}"
                if line.strip():
                    yield place, _document(_parsed(line, place), field, place)
    elif path.suffix in _OTHER_FILES:
        raise ValueError(
            f"{path}: a {path.suffix} file: wanted .npy, .jsonl (one JSON object a line) or text; convert it, or "
            "pass an iterable from Python"
        )
    else:
        yield str(path), _Text(_pieces(path))


def _mapped(path: Path) -> NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, TypeError, SyntaxError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: no readable .npy array ({reason}): wanted int32 tokens [rows, time]") from error
    return _array(array, str(path))


def _array(array: NDArray[Any], place: str) -> NDArray[Any]:
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu" or not array.size:
        raise ValueError(
            f"{place}: an array of {array.dtype} with shape {array.shape}; wanted int32 tokens [rows, time] or [time]; "
            "tokenize it first"
        )
    return array


def _parsed(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        shown = line.strip()[:40].decode("utf-8", "replace")
        raise ValueError(f"{place}: found {shown!r}, which is no JSON ({error}): wanted one object a line") from error


def _pieces(path: Path) -> Iterator[str]:
    """The text of a file in pieces that end with a line, if one ends in them; bytes that are no text stay as they are
    for byte-level models only.
    """
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        waiting = file.read(_PIECE)
        while more := file.read(_PIECE):
            whole, newline, rest = waiting.rpartition("\n")
            if newline or len(rest) > _LONGEST_LINE:
                yield whole + newline if newline else rest
                waiting = rest + more if newline else more
            else:
                waiting += more
        if waiting:
            yield waiting


def _document(document: Any, field: str | None, place: str) -> Any:
    """A string as text, tokens as an array, of a mapping its field."""
    if isinstance(document, Mapping):
        names = FIELDS if field is None else (field,)
        name = next((name for name in names if name in document), None)
        if name is None:
            found = ", ".join(map(repr, sorted(map(str, document)))) or "nothing"
            wanted = " or ".join(map(repr, names))
            raise ValueError(f"{place}: found the fields {found}: wanted {wanted}; name the field")
        return _document(_joined(document[name], place), None, f"{place}, {name!r}")
    if isinstance(document, str):
        return _Text([document])
    try:
        tokens = np.asarray(document)
    except ValueError:  # lists of different lengths
        tokens = np.empty(())
    if tokens.shape == (0,):
        return np.empty(0, np.int32)
    if tokens.ndim not in (1, 2) or tokens.dtype.kind not in "iu":
        raise ValueError(f"{place}: found {repr(document)[:40]}: wanted text, a list of tokens, or an array of them")
    return tokens


def _joined(value: Any, place: str) -> Any:
    """The contents of messages as one text; anything else as it is."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value or not isinstance(value[0], Mapping):
        return value
    contents = []
    for message in value:
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list) else [content]
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
        if not all(isinstance(text, str) or text is None for text in texts) or not isinstance(message, Mapping):
            raise ValueError(f"{place}: found the message {repr(message)[:40]}: wanted one with text as its 'content'")
        contents += [text for text in texts if text]
    return "\n\n".join(contents)


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else "calibration data"
