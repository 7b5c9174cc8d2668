"""Rows of tokens from files and iterables: packing, what is refused, and that no more is read than is needed."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxfp4.models import calibration_data
from jaxfp4.models.calibration_data import read_calibration_data, token_batches, token_rows
from jaxfp4.models.text_tokenizer import TextTokenizer, byte_tokenizer, load_tokenizer

WORDS = ["<unk>", "<bos>", "<eos>", "a", "b", "c", "d"]
UNK, BOS, EOS, A, B, C, D = range(7)
LINES = ["a b", "c", "d d d"]
PACKED = [A, B, EOS, C, EOS, D, D, D]


def word_tokenizer(directory, *, bos=False):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    return load_tokenizer(directory)


@pytest.fixture
def words(tmp_path):
    return word_tokenizer(tmp_path / "words")


def rows(source, tokenizer=None, length=4, vocabulary=7, **options):
    found = list(token_rows(source, vocabulary=vocabulary, tokenizer=tokenizer, sequence_length=length, **options))
    assert all(row.dtype == np.int32 and row.ndim == 1 for row in found)
    return [row.tolist() for row in found]


def jsonl(path, *objects):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in objects))
    return path


def test_documents_are_packed_with_the_end_of_a_sequence_between(words, tmp_path):
    file = jsonl(tmp_path / "d.jsonl", *({"text": line} for line in LINES))
    assert rows(file, words) == [PACKED[:4], PACKED[4:]] == rows(str(file), words)
    assert rows(file, words, length=3) == [PACKED[:3], PACKED[3:6]]
    assert rows(file, words, length=9) == []
    assert rows(iter(LINES), words) == [PACKED[:4], PACKED[4:]]
    assert rows(LINES, TextTokenizer(words.encode, words.encode_more), length=3) == [[A, B, C], [D, D, D]]


def test_fields_of_json_objects(words, tmp_path):
    path = tmp_path / "d.jsonl"
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": [{"type": "text", "text": "c"}]}]
    messages += [{"role": "assistant", "content": None, "tool_calls": []}]
    assert rows(jsonl(path, {"messages": messages, "id": 1}), words, length=3) == [[A, B, C]]
    assert rows(jsonl(path, {"input_ids": [A, B], "attention_mask": [1, 1]}, {"input_ids": [C]}), words) == [PACKED[:4]]
    assert rows(jsonl(path, {"text": "a b c d", "input_ids": [D] * 4}), words) == [[A, B, C, D]]
    assert rows(jsonl(path, {"text": "d", "story": "a b c d"}), words, field="story") == [[A, B, C, D]]
    assert rows(jsonl(path, {"text": "d", "talk": messages}), words, length=3, field="talk") == [[A, B, C]]
    assert rows(jsonl(path, "a b c d", [A, B, C]), words) == [[A, B, C, D], [EOS, A, B, C]]
    path.write_bytes(b'\xef\xbb\xbf{"text": "a b"}\r\n\r\n  \n{"text": "c"}')
    assert rows(path, words) == [PACKED[:4]]


def test_a_text_file_is_one_document(tmp_path):
    words = word_tokenizer(tmp_path / "words", bos=True)
    path = tmp_path / "d.txt"
    path.write_text("a b\n\nc\nd d")
    assert rows(path, words, length=6) == [[BOS, A, B, C, D, D]]
    assert rows(["a b", "c"], words, length=6) == [[BOS, A, B, EOS, BOS, C]]


def test_long_text_is_read_in_pieces_of_whole_lines(tmp_path, monkeypatch):
    pieces = []

    def encode(text):
        pieces.append(text)
        return byte_tokenizer().encode(text)

    monkeypatch.setattr(calibration_data, "_PIECE", 10)
    monkeypatch.setattr(calibration_data, "_LONGEST_LINE", 30)
    text = "".join(f"line {i}\n" for i in range(9)) + "x" * 100 + "\nthe é end"
    path = tmp_path / "d.md"
    path.write_text(text, encoding="utf-8")
    first = []
    tokenizer = TextTokenizer(lambda text: first.append(text) or encode(text), encode)
    found = rows(path, tokenizer, length=5, vocabulary=256)
    data = text.encode()
    assert bytes(itertools.chain(*found)) == data[: len(data) // 5 * 5]
    assert "".join(pieces) == text and first == pieces[:1] and len(pieces) > 8
    assert all(piece.endswith("\n") for piece in pieces if "line" in piece)
    assert max(map(len, pieces)) <= 60


def test_bytes_of_a_byte_level_model_need_be_no_text(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)))
    assert rows(path, byte_tokenizer(), length=256, vocabulary=256) == [list(range(256))]
    assert rows(["ab", "c"], byte_tokenizer(), vocabulary=256) == [[97, 98, 0, 99]]


def test_rows_of_an_array_are_rows(tmp_path):
    tokens = np.arange(15, dtype=np.uint16).reshape(3, 5)
    np.save(tmp_path / "t.npy", tokens)
    for source in (tmp_path / "t.npy", tokens, [tokens[:2], tokens[2:]], [jnp.asarray(tokens)], [tokens.tolist()]):
        assert rows(source, length=9, vocabulary=15) == tokens.tolist() == rows(source, length=None, vocabulary=15)
        assert rows(source, length=2, vocabulary=15) == tokens[:, :2].tolist()
    np.save(tmp_path / "fortran.npy", np.asfortranarray(tokens))
    assert rows(tmp_path / "fortran.npy", vocabulary=15) == tokens[:, :4].tolist()


def test_a_stream_of_tokens_is_cut_into_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_data, "_PIECE", 3)
    np.save(tmp_path / "t.npy", np.arange(10, dtype=np.int64))
    for source in (tmp_path / "t.npy", np.arange(10), [np.arange(10)], [list(range(10))], [jnp.arange(10)]):
        assert rows(source, vocabulary=10) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rows([[1, 2], [], [3, 4]], vocabulary=10) == [[1, 2, 3, 4]]


def test_no_more_is_read_than_is_needed(tmp_path):
    """A million lines would be refused in the end, and a stream need not end at all."""
    found = token_rows(itertools.cycle(["abc"]), vocabulary=256, tokenizer=byte_tokenizer(), sequence_length=4)
    assert [row.tolist() for row in itertools.islice(found, 2)] == [[97, 98, 99, 0]] * 2
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "abcd"}\n' * 4 + "no JSON")
    data = read_calibration_data(path, vocabulary=256, tokenizer=byte_tokenizer(), sequence_length=4, samples=3)
    assert data.rows == 3
    with pytest.raises(ValueError, match="line 5: found 'no JSON'"):
        read_calibration_data(path, vocabulary=256, tokenizer=byte_tokenizer(), sequence_length=4, samples=9)


def test_batches_and_how_many_there_are():
    source = np.arange(20).reshape(5, 4)
    data = read_calibration_data(source, vocabulary=20, samples=8, batch_size=2)
    assert [batch.shape for batch in data] == [(2, 4), (2, 4), (1, 4)] and len(data) == 3
    np.testing.assert_array_equal(np.concatenate(list(data)), source)
    assert (data.rows, data.wanted, data.tokens) == (5, 8, 20)
    assert str(data) == "5 rows of 4 tokens, all that there are of the 8 asked for"
    assert str(read_calibration_data(source, vocabulary=20, samples=5)) == "5 rows of 4 tokens"
    lengths = [np.zeros((1, 3), int), np.zeros((2, 5), int)]
    mixed = read_calibration_data(lengths, vocabulary=1, samples=3)
    assert [batch.shape for batch in mixed] == [(1, 3), (2, 5)] and str(mixed) == "3 rows of 3 to 5 tokens"
    assert [len(batch) for batch in token_batches(iter(source), 4)] == [4, 1]


def test_default_length_is_for_what_is_packed():
    options = {"vocabulary": 100, "default_length": 7}
    assert [len(row) for row in token_rows(np.arange(20), **options)] == [7, 7]
    assert [len(row) for row in token_rows(np.zeros((1, 20), int), **options)] == [20]
    batches = read_calibration_data([list(range(20))], vocabulary=100, default_length=7)
    assert [batch.shape for batch in batches] == [(2, 7)] and str(batches).startswith("2 rows of 7 tokens")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt: no such file: wanted .npy, .jsonl or text"),
        ("a.json", "{}", "a.json: a .json file: wanted .npy, .jsonl"),
        ("a.jsonl", '{"text": "a"}\n{"text"\n', "a.jsonl, line 2: found '{\"text\"', which is no JSON"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl, line 1: found .*, which is no JSON .'utf-8' codec"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: found '.*', which is no JSON"),
        ("a.jsonl", '{"body": "a"}', "a.jsonl, line 1: found the fields 'body': wanted 'text' or 'messages' or"),
        ("a.jsonl", "{}", "a.jsonl, line 1: found the fields nothing: wanted"),
        ("a.jsonl", '{"text": 3}', "a.jsonl, line 1, 'text': found 3: wanted text, a list of tokens, or an array"),
        ("a.jsonl", '{"text": null}', "line 1, 'text': found None: wanted text"),
        ("a.jsonl", '{"input_ids": [1, 2.5]}', r"line 1, 'input_ids': found \[1, 2.5\]: wanted text, a list of tokens"),
        ("a.jsonl", '{"input_ids": [[1], [2, 3]]}', r"'input_ids': found \[\[1\], \[2, 3\]\]: wanted"),
        ("a.jsonl", '{"input_ids": [true]}', r"'input_ids': found \[True\]: wanted"),
        ("a.jsonl", '{"input_ids": [1e400]}', r"'input_ids': found \[inf\]: wanted"),
        ("a.jsonl", f'{{"input_ids": [{10**30}]}}', r"'input_ids': found \[10+\]: wanted"),
        ("a.jsonl", '{"messages": [{"content": 3}]}', "line 1: found the message {'content': 3}: wanted one with text"),
        ("a.jsonl", '{"messages": [{"content": "a"}, 4]}', "line 1: found the message 4: wanted one with text"),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1: found bytes that are no UTF-8 text .surrogates not allowed"),
        ("a.txt", b"a \xff b", "a.txt: found bytes that are no UTF-8 text .surrogates not allowed.: wanted text"),
        ("a.jsonl", '{"input_ids": [1, 7]}', "a.jsonl, line 1: tokens from 1 to 7; wanted 0 to 6"),
        ("a.npy", b"\x93NUMPY", "a.npy: no readable .npy array"),
        ("a.npy", b"not at all", "a.npy: no readable .npy array"),
        ("a.npy", b"", "a.npy: no readable .npy array"),
    ],
)
def test_broken_files_are_one_line(words, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        rows(path, words)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_arrays_of_something_else(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was run",))

    np.save(tmp_path / "o.npy", np.array([Hostile()]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"o\.npy: no readable \.npy array"):
        rows(tmp_path / "o.npy")
    for array in (np.ones((2, 3)), np.ones((1, 2, 3), int), np.ones((0, 3), int), np.ones((), int), np.ones(2, bool)):
        np.save(tmp_path / "a.npy", array)
        for source in (tmp_path / "a.npy", array):
            with pytest.raises(ValueError, match=r"with shape .*; wanted int32 tokens \[rows, time\] or \[time\]"):
                rows(source)
    tokens = np.ones((3, 2), int)
    tokens[1, 1] = -1
    with pytest.raises(ValueError, match="tokens, row 2: tokens from -1 to 1; wanted 0 to 6, the model's vocabulary"):
        rows(tokens)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (3, {}, "calibration data of type int: wanted a file, an array, or an iterable"),
        (["a", 3], {}, "document 2: found 3: wanted text, a list of tokens"),
        ([b"ab"], {}, "document 1: found b'ab': wanted text"),
        (
            ["a"],
            {"tokenizer": None},
            r"document 1: text: wanted a tokenizer; pass tokenizer=load_tokenizer\(model_dir\)",
        ),
        ([], {}, "calibration data: not one row of 4 tokens: wanted more text or tokens, or a shorter"),
        (["abc"], {}, "not one row of 4 tokens"),
        (["abcd"], {"sequence_length": 0}, "sequence_length=0: wanted at least 1"),
        (["abcd"], {"samples": 0}, "samples=0: wanted at least 1"),
        (["abcd"], {"batch_size": -1}, "batch_size=-1: wanted at least 1"),
        ([{"story": "abcd"}], {"field": "tale"}, "document 1: found the fields 'story': wanted 'tale'; name the field"),
    ],
)
def test_sources_that_are_none(source, options, message):
    with pytest.raises(ValueError, match=message):
        read_calibration_data(
            source, **{"vocabulary": 256, "tokenizer": byte_tokenizer(), "sequence_length": 4, **options}
        )


def test_the_separator_is_that_of_the_tokenizer_or_of_the_config(tmp_path):
    assert word_tokenizer(tmp_path).separator == EOS
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert load_tokenizer(tmp_path).separator == EOS
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<other>"}))
    assert load_tokenizer(tmp_path).separator == 3
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).separator == 5
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": None}))
    assert load_tokenizer(tmp_path).separator is None


def test_truncation_and_padding_of_the_file_do_not_count(words):
    assert words.encode("a b c") == [A, B, C]


def test_tokenizers_that_cannot_be_read(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer\.json: found no tokenizer in .*: wanted tokenizer\.json; write"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"found tokenizer\.model in .*: wanted tokenizer\.json; write it with"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: no readable tokenizer \(.*\): wanted one of Hugging Face"
    ) as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)
    word_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: no valid JSON \(.*\); restore the file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: holds a JSON list: wanted an object"):
        load_tokenizer(tmp_path)
