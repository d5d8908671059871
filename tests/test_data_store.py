"""Text to token stores: what is read, what is cached, what is refused."""

import bz2
import dataclasses
import gzip
import json
import lzma
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jsparse.config import ConfigError, Source
from jsparse.data import build, open_source, store, text
from tests.helpers import save_byte_tokenizer

END, OTHER_END, VOCAB = 256, 257, 258
TEXTS = ["first document", "zweites, mit Ümlaut\n\nund Absatz", "", "third \U0001f40d"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return folder


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encode(*documents: str, end: int = END) -> list[int]:
    return [token for text in documents for token in [*text.encode(), end]]


def write_store(folder: Path, documents: list[list[int]], loss: list[bool] | None = None) -> Path:
    """A token store of these documents, as `build` would leave it."""
    folder.mkdir()
    tokens = np.array([t for d in documents for t in d], np.uint16)
    starts = np.cumsum([0, *(len(d) for d in documents)])[:-1]
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "offsets.npy", starts.astype(np.int64))
    if loss is not None:
        np.save(folder / "loss.npy", np.array(loss, bool))
    about = {"format": 1, "tokens": len(tokens), "documents": len(documents), "largest_id": int(tokens.max())}
    (folder / "store.json").write_text(json.dumps(about))
    return folder


def tokens(source, folder, cache) -> list[int]:
    return open_source(source, folder, cache, VOCAB).tokens.tolist()


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".bz2"])
def test_json_lines(tmp_path, tokenizer, suffix):
    # other columns may change their type from line to line; empty lines are nothing
    lines = [json.dumps({"text": t, "meta": i if i else "none"}) for i, t in enumerate(TEXTS)]
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix]
    path = tmp_path / f"data.jsonl{suffix}"
    path.write_bytes(pack("\n\n".join(lines).encode()))
    opened = open_source(Source(str(path)), tokenizer, tmp_path / "cache", VOCAB)
    assert opened.tokens.tolist() == encode(*TEXTS)
    assert opened.tokens.dtype == np.uint16 and opened.loss is None
    starts = np.cumsum([0, *(len(encode(t)) for t in TEXTS)])[:-1]
    assert opened.offsets.tolist() == starts.tolist()


def test_parquet(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "n": [1, 2, 3, 4]}), path)
    assert tokens(Source(str(path), text="body"), tokenizer, tmp_path / "cache") == encode(*TEXTS)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"data\.parquet: cannot be read"):
        tokens(Source(str(path), text="body"), tokenizer, tmp_path / "cache")


def test_text_files_are_one_document_each(tmp_path, tokenizer):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"line\r\nline\n")
    (folder / "a.txt").write_text(TEXTS[1])
    (folder / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"c"))
    (folder / "README.md").write_text("not text of ours")
    assert tokens(Source(str(folder)), tokenizer, tmp_path / "cache") == encode(TEXTS[1], "line\r\nline\n", "c")
    assert tokens(Source(str(folder / "b.txt")), tokenizer, tmp_path / "cache") == encode("line\r\nline\n")


def test_datasets_name(tmp_path, tokenizer, monkeypatch):
    import datasets

    data = datasets.Dataset.from_dict({"text": TEXTS})

    def load(name, config, split):
        assert (name, config, split) == ("owner/name", "small", "validation")
        return data

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Source("owner/name:small", split="validation")
    assert tokens(source, tokenizer, tmp_path / "cache") == encode(*TEXTS)
    monkeypatch.setattr(store, "_write", None)  # not called again
    assert tokens(source, tokenizer, tmp_path / "cache") == encode(*TEXTS)


def test_long_texts_are_cut_at_spaces(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(store, "_PIECE", 10)
    body = "words and words " + "x" * 25 + " end"
    pieces = [p.text for p in store._pieces(iter([(1.0, (None, body))]))]
    assert "".join(pieces) == body and max(map(len, pieces)) <= 10 and pieces[1].startswith(" ")
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": t} for t in [body, *TEXTS]])
    opened = open_source(Source(str(path)), tokenizer, tmp_path / "cache", VOCAB)
    assert opened.tokens.tolist() == encode(body, *TEXTS)
    assert opened.offsets.tolist() == np.cumsum([0, *(len(encode(t)) for t in [body, *TEXTS])])[:-1].tolist()


def test_prompts_take_no_loss(tmp_path, tokenizer):
    rows = [{"ask": "2+2?", "answer": " 4"}, {"ask": "", "answer": "hello"}]
    path = write_jsonl(tmp_path / "sft.jsonl", rows)
    opened = open_source(Source(str(path), text="answer", prompt="ask"), tokenizer, tmp_path / "cache", VOCAB)
    assert opened.tokens.tolist() == encode("2+2? 4", "hello")
    assert opened.loss.tolist() == [False] * 4 + [True] * 3 + [True] * 6
    assert opened.offsets.tolist() == [0, 7]


def test_end_token(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "a"}])
    assert tokens(Source(str(path), end_token="<|other|>"), tokenizer, tmp_path / "cache") == encode("a", end=OTHER_END)
    with pytest.raises(ConfigError, match=r"expected the end_token '</s>' in .*, got a vocabulary without it"):
        tokens(Source(str(path), end_token="</s>"), tokenizer, tmp_path / "cache")


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a\\ud83d"}')
    assert tokens(Source(str(path)), tokenizer, tmp_path / "cache") == encode("a?")


def test_truncation_and_padding_in_the_tokenizer_file_are_ignored(tmp_path, tokenizer):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    folder = tmp_path / "truncating"
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "longer than three"}, {"text": "b"}])
    assert tokens(Source(str(path)), folder, tmp_path / "cache") == encode("longer than three", "b")


# ---------------------------------------------------------------------------------------------------------- the cache


def test_cache_is_keyed_by_content_tokenizer_and_columns(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "abc", "other": "xyz"}])
    source, cache = Source(str(path)), tmp_path / "cache"
    first = build(source, tokenizer, cache)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    stamp = (first / "store.json").stat().st_mtime_ns
    assert build(source, tokenizer, cache) == first and (first / "store.json").stat().st_mtime_ns == stamp
    assert build(Source(str(copy)), tokenizer, cache).name.removeprefix("copy") == first.name.removeprefix("data")

    other_tokenizer = tmp_path / "tokenizer"
    changed = AutoTokenizer.from_pretrained(tokenizer)
    changed.add_tokens(["abc"])
    changed.save_pretrained(other_tokenizer)
    stores = {
        first,
        build(dataclasses.replace(source, text="other"), tokenizer, cache),
        build(dataclasses.replace(source, prompt="other"), tokenizer, cache),
        build(dataclasses.replace(source, end_token="<|other|>"), tokenizer, cache),
        build(source, other_tokenizer, cache),
    }
    path.write_text(path.read_text().replace("abc", "abd"))
    stores.add(build(source, tokenizer, cache))
    assert len(stores) == 6
    assert np.load(first / "tokens.npy").tolist() == encode("abc")  # the old content keeps its store


def test_interrupted_build_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "abc"}] * 5)
    read = text._rows

    def stopped(*args):
        yield next(read(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "_rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        build(Source(str(path)), tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    monkeypatch.undo()
    assert tokens(Source(str(path)), tokenizer, tmp_path / "cache") == encode(*["abc"] * 5)


def test_racing_builders_agree(tmp_path, tokenizer, monkeypatch):
    """Each has written its arrays before any of them renames."""
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": t} for t in TEXTS])
    barrier, write = threading.Barrier(3), store._write

    def together(*args):
        counts = write(*args)
        barrier.wait(timeout=60)
        return counts

    monkeypatch.setattr(store, "_write", together)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(build, Source(str(path)), tokenizer, tmp_path / "cache") for _ in range(3)]
        stores = {run.result() for run in runs}
    assert len(stores) == 1 and list((tmp_path / "cache" / "tokens").iterdir()) == list(stores)
    assert np.load(next(iter(stores)) / "tokens.npy").tolist() == encode(*TEXTS)


# ----------------------------------------------------------------------------------------------- stores and bare files


def test_ready_tokens_need_neither_datasets_nor_transformers(tmp_path):
    """In a fresh interpreter where importing them fails: a store and a bare file, opened, shuffled and placed."""
    write_store(tmp_path / "store", [list(range(20)), list(range(30))])
    np.save(tmp_path / "bare.npy", np.arange(100, dtype=np.uint32))
    program = """
import sys
for name in ("datasets", "transformers", "tokenizers", "grain", "pyarrow", "torch"):
    sys.modules[name] = None
from jsparse.config import DataConfig, Source
from jsparse.data import Loader, open_source
from jsparse.parallel import single_device_mesh
sources = tuple(Source(path) for path in sys.argv[1:])
stores = [open_source(source, None, "unused", 100) for source in sources]
loader = Loader(stores, DataConfig(train=sources, seq_len=8, batch_size=4))
with loader.iterate(0, single_device_mesh()) as batches:
    print(next(batches).tokens.shape, [windows.count for windows in loader.windows])
try:
    open_source(Source("text.txt"), ".", "unused", 100)
except ValueError as error:
    print(error)
"""
    (tmp_path / "text.txt").write_text("text")
    command = [sys.executable, "-c", program, str(tmp_path / "store"), str(tmp_path / "bare.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.splitlines() == [
        "(4, 8) [6, 12]",
        "data: to read text install transformers, or give a token store",
    ], done.stderr


def test_wide_vocabularies_take_32_bits(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    wide = AutoTokenizer.from_pretrained(tokenizer)
    wide.add_tokens([f"<{i}>" for i in range(1 << 16)])
    wide.save_pretrained(tmp_path / "wide")
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "a<65535>"}])
    opened = open_source(Source(str(path)), tmp_path / "wide", tmp_path / "cache", 1 << 17)
    assert opened.tokens.dtype == np.uint32 and opened.tokens.tolist() == [97, VOCAB + 65535, END]


# ---------------------------------------------------------------------------------------------------------- bad input


def assert_refused(kind, message, source, folder, cache, vocab_size=VOCAB):
    with pytest.raises(kind, match=message) as caught:
        open_source(source, folder, cache, vocab_size)
    assert "\n" not in str(caught.value)
    if (cache / "tokens").exists():
        assert list((cache / "tokens").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("gone.jsonl", None, ConfigError, r"gone\.jsonl: no such file"),
        ("gone.npy", None, ConfigError, r"gone\.npy: no such file"),
        ("data.csv", b"a,b", ConfigError, r"data\.csv: expected \.txt or \.jsonl"),
        ("empty.jsonl", b"", ValueError, r"empty\.jsonl: expected text, got 0 documents"),
        (
            "blank.jsonl",
            b'{"text": ""}\n{"text": ""}',
            ValueError,
            r"blank\.jsonl: expected text, got 2 documents without",
        ),
        ("empty.txt", b"", ValueError, r"empty\.txt: expected text"),
        ("latin.txt", b"caf\xe9 ", ValueError, r"latin\.txt: cannot be read: 'utf-8' codec"),
        ("column.jsonl", b'{"body": "x", "n": 1}', ConfigError, r"jsonl:1: expected a column 'text', got only body, n"),
        (
            "null.jsonl",
            b'{"text": "x"}\n{"text": null}',
            ValueError,
            r"jsonl:2: expected text in column 'text', got None",
        ),
        ("list.jsonl", b'["x"]', ValueError, r"jsonl:1: expected an object with columns, got list"),
        ("bad.jsonl", b'{"text": "x"}\n{"text": ', ValueError, r"bad\.jsonl:2: cannot be read"),
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-20],
            ValueError,
            r"cut\.jsonl\.gz:\S+ cannot be read",
        ),
        (
            "cut.jsonl.xz",
            lzma.compress(b'{"text": "x"}\n' * 99)[:-20],
            ValueError,
            r"cut\.jsonl\.xz:\S+ cannot be read",
        ),
        ("not.txt.gz", b"plain", ValueError, r"not\.txt\.gz: cannot be read"),
    ],
)
def test_bad_files(tmp_path, tokenizer, name, content, kind, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_refused(kind, message, Source(str(tmp_path / name)), tokenizer, tmp_path / "cache")


def test_empty_folder_and_unknown_name(tmp_path, tokenizer):
    (tmp_path / "folder").mkdir()
    assert_refused(ConfigError, "folder: expected .txt or", Source(str(tmp_path / "folder")), tokenizer, tmp_path / "c")
    assert_refused(ConfigError, "^no/such: neither a file nor a data set", Source("no/such"), tokenizer, tmp_path / "c")


def test_tokenizer_folder(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "abc"}])
    source, cache = Source(str(path)), tmp_path / "cache"
    assert_refused(
        ConfigError, r"data\.tokenizer: expected a tokenizer folder to read .*, got none", source, None, cache
    )
    assert_refused(ConfigError, "expected a tokenizer folder, got .*gone", source, tmp_path / "gone", cache)
    (tmp_path / "folder").mkdir()
    assert_refused(ConfigError, "folder does not load", source, tmp_path / "folder", cache)


def test_tokens_beyond_the_vocabulary(tmp_path, tokenizer):
    message = "expected token ids below the model's vocab_size 200, got 256: the tokenizer is another model's"
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "abc"}])
    made = build(Source(str(path)), tokenizer, tmp_path / "cache")
    np.save(tmp_path / "bare.npy", np.array([1, 256], np.uint16))
    for ready in (path, made, tmp_path / "bare.npy"):
        with pytest.raises(ConfigError, match=message):
            open_source(Source(str(ready)), tokenizer, tmp_path / "cache", 200)


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.uint16), np.zeros(3, np.int64), np.zeros(0, np.uint16)])
def test_files_that_hold_no_token_ids(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    assert_refused(ValueError, r"x\.npy: ", Source(str(tmp_path / "x.npy")), None, tmp_path)


def test_pickles_are_not_loaded(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}]), allow_pickle=True)
    assert_refused(ValueError, r"x\.npy: not a whole \.npy file", Source(str(tmp_path / "x.npy")), None, tmp_path)


def test_damaged_stores(tmp_path):
    def refuse(kind, message):
        assert_refused(kind, message, Source(str(folder)), None, tmp_path)

    folder = write_store(tmp_path / "s", [[1, 2, 3], [4, 5]])
    with pytest.raises(ConfigError, match="holds no prompts, but the source asks for `prompt: ask`"):
        open_source(Source(str(folder), prompt="ask"), None, tmp_path, VOCAB)
    whole = (folder / "tokens.npy").read_bytes()
    (folder / "tokens.npy").write_bytes(whole[:-2])
    refuse(ValueError, r"tokens\.npy: not a whole \.npy file")
    np.save(folder / "tokens.npy", np.arange(4, dtype=np.uint16))
    refuse(ValueError, "expected the 5 tokens and 2 documents of store.json, got 4 and 2")
    (folder / "tokens.npy").unlink()
    refuse(ConfigError, r"tokens\.npy: no such file")
    about = (folder / "store.json").read_text()
    (folder / "store.json").write_text(about.replace('"format": 1', '"format": 2'))
    refuse(ValueError, "expected a token store of format 1, got 2")
    (folder / "store.json").write_text("{}")
    refuse(ValueError, "store.json: not that of a token store")
