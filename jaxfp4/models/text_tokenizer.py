"""The tokenizer of a checkpoint, as calibration needs it: text in, tokens out, and what separates documents."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxfp4.checkpoints.configs import read_object
from jaxfp4.models.corpus import FILE_START

BYTE_VOCABULARY = 256
TOKENIZER_FILE = "tokenizer.json"
_OTHER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """How text becomes tokens; one of your own may wrap any library's."""

    encode: Callable[[str], Sequence[int]]
    """The tokens of a document, with those that its beginning has, such as a beginning-of-sequence token."""
    encode_more: Callable[[str], Sequence[int]]
    """The tokens of a later piece of it, without these."""
    separator: int | None = None
    """The token between documents: that of the end of a sequence; None for none."""


def byte_tokenizer() -> TextTokenizer:
    """UTF-8 bytes as tokens, with a zero byte between documents, as the built-in model was trained.

    >>> byte_tokenizer().encode("hé")
    [104, 195, 169]
    """

    def encode(text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))

    return TextTokenizer(encode, encode, FILE_START[0])


def load_tokenizer(model_dir: str | os.PathLike[str]) -> TextTokenizer:
    """The tokenizer in the `tokenizer.json` of a checkpoint directory; no other format is read, and no code is run.

    Documents are separated by the `eos_token` of tokenizer_config.json, or else by the (first) `eos_token_id` of
    generation_config.json or config.json; by nothing where none of them has one.

    Raises FileNotFoundError if there is no such file, ValueError if it, or one of the others, cannot be read.
    """
    from tokenizers import Tokenizer  # here, as it takes .1 s that few commands need

    directory = Path(model_dir)
    file = directory / TOKENIZER_FILE
    if not file.is_file():
        others = [name for name in _OTHER_FILES if (directory / name).is_file()]
        found = f"found {', '.join(others)} in {directory}" if others else f"found no tokenizer in {directory}"
        raise FileNotFoundError(
            f"{file}: {found}: wanted {TOKENIZER_FILE}; write it with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...), or pass tokens as .npy"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other class
        text = str(error).splitlines()[0]
        raise ValueError(f"{file}: no readable tokenizer ({text}): wanted one of Hugging Face tokenizers") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encoded(text: str, add_special_tokens: bool) -> list[int]:
        text.encode()  # UnicodeEncodeError for what is no text
        return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    encode = functools.partial(encoded, add_special_tokens=True)
    return TextTokenizer(encode, functools.partial(encoded, add_special_tokens=False), _separator(directory, tokenizer))


def _separator(directory: Path, tokenizer: Any) -> int | None:
    named = _read(directory / "tokenizer_config.json").get("eos_token")
    name = named.get("content") if isinstance(named, dict) else named
    if isinstance(name, str):
        number = tokenizer.token_to_id(name)
        if number is not None:
            return int(number)
    for file in ("generation_config.json", "config.json"):
        found = _read(directory / file).get("eos_token_id")
        first = found[0] if isinstance(found, list) and found else found
        if type(first) is int:
            return first
    return None


def _read(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}
