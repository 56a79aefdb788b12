"""Sources: each kind gives its documents, twice the same, in two splits that share none; bad ones are one sentence."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from moe.config import DataConfig
from moe.data.sources import Source, open_source
from moe.data.sources.stdlib_modules import TRAIN_MODULES, VALIDATION_MODULES
from moe.data.tokens import Tally
from moe.errors import DataError

from .conftest import documents, write_jsonl

TEXTS = documents(40)


def opened(word: object, **fields: object) -> Source:
    return open_source(str(word), DataConfig(source=str(word), **fields))  # type: ignore[arg-type]


def splits(source: Source) -> tuple[list[str], list[str]]:
    """Both splits, which must come out twice the same and have no document in common."""
    train, validation = (list(source.documents(split)) for split in ("train", "validation"))  # type: ignore[arg-type]
    assert [train, validation] == [list(source.documents("train")), list(source.documents("validation"))]
    assert not set(train) & set(validation)
    return train, validation


def sentence(word: object, **fields: object) -> str:
    """What a source that cannot be used says."""
    with pytest.raises(DataError) as caught:
        splits(opened(word, **fields))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_standard_library_is_a_corpus() -> None:
    """Megabytes of source and prose; no file on both sides."""
    train, validation = splits(opened("stdlib"))
    assert sum(map(len, train)) > 5_000_000
    assert 100_000 < sum(map(len, validation)) < 1_000_000
    assert not set(TRAIN_MODULES) & set(VALIDATION_MODULES)
    assert len(set(TRAIN_MODULES)) == len(TRAIN_MODULES)


def test_a_folder_of_text_is_split_by_file(tmp_path: Path) -> None:
    """The same files are held out wherever the folder lies; hidden files and folders are not text."""
    for copy in ("a", "b"):
        for number in range(20):
            file = tmp_path / copy / f"part{number % 3}" / f"{number}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"document {number}\n")
        (tmp_path / copy / ".hidden").write_bytes(b"\xff")
        (tmp_path / copy / ".git").mkdir()
        (tmp_path / copy / ".git" / "index").write_bytes(b"\xff")
    one, two = (splits(opened(tmp_path / copy, validation_fraction=0.2)) for copy in ("a", "b"))
    assert one == two
    assert (len(one[0]), len(one[1])) == (16, 4)


def test_a_text_file_is_cut_in_two(tmp_path: Path) -> None:
    """One text file: its end is held out."""
    (tmp_path / "text").write_text("ab" * 400 + "cd" * 50)
    assert splits(opened(tmp_path / "text", validation_fraction=0.1)) == (["ab" * 400 + "cd" * 5], ["cd" * 45])


def test_rows_are_documents(tmp_path: Path) -> None:
    """JSONL, compressed or not, and Parquet give the same rows from the named field, in order, split by row."""
    import pyarrow
    import zstandard
    from pyarrow import parquet

    plain = write_jsonl(tmp_path / "rows.jsonl", TEXTS, field="body")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    table = pyarrow.table({"id": range(40), "body": TEXTS})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"):
        train, validation = splits(opened(tmp_path / name, text_field="body", validation_fraction=0.1))
        assert validation == TEXTS[::10]
        assert train == [text for number, text in enumerate(TEXTS) if number % 10]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_text_is_text(tmp_path: Path, suffix: str) -> None:
    """Alone and in a folder, with lines ended either way; compressed parts one after another are one file."""
    import zstandard

    compress = {"gz": gzip.compress, "zst": zstandard.compress}[suffix]
    first, second = (("ü" * 70_000 + "\r\n" + end).encode() for end in ("ab" * 400, "cd" * 50))
    (tmp_path / "text").write_bytes(first + second)
    (tmp_path / f"text.{suffix}").write_bytes(compress(first) + compress(b"") + compress(second))
    assert splits(opened(tmp_path / f"text.{suffix}")) == splits(opened(tmp_path / "text"))
    for number in range(4):
        file = tmp_path / "folder" / f"{number}.txt.{suffix}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(compress(f"document {number}\n".encode()))
    train, validation = splits(opened(tmp_path / "folder"))
    assert sorted(train + validation) == [f"document {number}\n" for number in range(4)]


def test_a_long_window_is_decompressed(tmp_path: Path) -> None:
    """Files of `zstd --long`, as large corpora are kept, need more memory than zstandard grants by itself."""
    import zstandard

    parameters = zstandard.ZstdCompressionParameters(window_log=28, hash_log=8, chain_log=8, strategy=1)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # which cannot know the size ahead
    file = tmp_path / "rows.jsonl.zst"
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    file.write_bytes(writer.compress(rows.encode()) + writer.flush())
    train, validation = splits(opened(file))
    assert sorted(train + validation) == sorted(TEXTS)


READ_WITHIN = """
import resource, sys
from moe.config import DataConfig
from moe.data.sources import open_source
from moe.errors import DataError
import zstandard
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(sys.argv[2]) * 2**20,) * 2)
try:
    print(sum(len(text) for text in open_source(sys.argv[1], DataConfig()).documents("train")))
except DataError as error:
    print(error)
"""


def read_within(mebibytes: int, file: Path) -> str:
    """What reading the documents says, in a process that may take so much more memory than it has when it begins."""
    command = [sys.executable, "-c", READ_WITHIN, str(file), str(mebibytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.strip()


def packed(pieces: Iterable[bytes]) -> bytes:
    """One zstandard frame, made piece by piece."""
    import zstandard

    writer = zstandard.ZstdCompressor().compressobj()
    return b"".join(writer.compress(piece) for piece in pieces) + writer.flush()


def test_a_frame_that_unpacks_to_far_more_than_memory_is_read_piece_by_piece(tmp_path: Path) -> None:
    """400 MB of rows from a file of some kilobytes, within 150 MiB: the documents are all there."""
    row = json.dumps({"text": "a" * 10**6}).encode() + b"\n"
    file = tmp_path / "rows.jsonl.zst"
    file.write_bytes(packed(row for _ in range(400)))
    assert file.stat().st_size < 200_000
    assert read_within(150, file) == str(380 * 10**6)  # a twentieth is for validation


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rows.jsonl.zst", "line 1 is longer than 256 MiB; cut its text into several rows"),
        (
            "text.zst",
            "holds more than 256 MiB of text, and a file is one document; decompress it, or cut it into several",
        ),
    ],
)
def test_a_bomb_is_one_sentence(tmp_path: Path, name: str, words: str) -> None:
    """1.77 GB of zeros without a line end, from 54 KB, within 1 GiB: the document is too long."""
    file = tmp_path / name
    file.write_bytes(packed(bytes(1 << 20) for _ in range(1700)))
    assert file.stat().st_size < 100_000
    assert read_within(1024, file) == f"data.source: {file} {words}"


def test_a_folder_counts_rows_over_its_files(tmp_path: Path) -> None:
    """Row files of a folder are one source, cut where they may be."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:13])
    write_jsonl(tmp_path / "deep" / "b.ndjson", TEXTS[13:])
    assert splits(opened(tmp_path, validation_fraction=0.1))[1] == TEXTS[::10]


def test_empty_documents_are_passed_over(tmp_path: Path) -> None:
    """No text, null and blank lines neither fail nor become documents."""
    rows = write_jsonl(tmp_path / "rows.jsonl", ["a", "", None, "b", "", "c"])
    rows.write_text("\n" + rows.read_text() + "  \n")
    assert splits(opened(rows, validation_fraction=0.001)) == (["b", "c"], ["a"])


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    """What save_to_disk wrote and what load_dataset builds; its own split `validation` where it has one."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"text": TEXTS, "other": list(range(40))})
    held = datasets.Dataset.from_dict({"text": ["held", "out"], "other": [1, 2]})
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "validation": held}).save_to_disk(tmp_path / "both")
    write_jsonl(tmp_path / "built" / "train.jsonl", TEXTS)
    write_jsonl(tmp_path / "built" / "validation.jsonl", ["held", "out"])
    fields = {"streaming": streaming, "validation_fraction": 0.1, "validation_documents": 4}
    assert splits(opened(f"hf:{tmp_path / 'both'}", **fields)) == (TEXTS, ["held", "out"])
    assert splits(opened(f"hf:{tmp_path / 'built'}", **fields)) == (TEXTS, ["held", "out"])
    train, validation = splits(opened(f"hf:{tmp_path / 'saved'}", **fields))
    assert validation == (TEXTS[:4] if streaming else TEXTS[::10])
    assert sorted(train + validation) == sorted(TEXTS)
    assert "has no field data.text_field='body'; it has " in sentence(f"hf:{tmp_path / 'both'}", text_field="body")
    assert "has a row without text in data.text_field='other'" in sentence(
        f"hf:{tmp_path / 'both'}", text_field="other"
    )
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "test")
    assert "has no split 'train'; it has 'test'" in sentence(f"hf:{tmp_path / 'test'}")


def test_a_dataset_that_is_not_there(tmp_path: Path) -> None:
    """An unknown name, offline: one sentence that names it. A misspelt word says how it is spelt."""
    code = "from moe.cli import main; main()"
    words = ("data", "prepare", "hf:nobody/nothing-here", "--out", str(tmp_path / "out"), "--vocab-size", "300")
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("moe: data.source='hf:nobody/nothing-here' cannot be loaded: ")
    assert len(done.stderr.splitlines()) == 1
    assert "is not spelt hf:NAME" in sentence("hf:a:b:c")


def test_missing_optional_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a package the sentence says what to install; plain and gzipped text and JSONL need none."""
    for package in ("datasets", "pyarrow", "zstandard"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "rows.parquet").write_bytes(b"")
    assert sentence("hf:some/name") == "data.source='hf:some/name' needs datasets; pip install 'frugal-moe[data]'"
    assert "needs pyarrow; pip install 'frugal-moe[data]'" in sentence(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl.zst").write_bytes(b"")
    assert "rows.jsonl.zst needs zstandard; pip install 'frugal-moe[data]'" in sentence(tmp_path / "rows.jsonl.zst")
    assert splits(opened(write_jsonl(tmp_path / "rows.jsonl", TEXTS)))


def test_text_that_cannot_be_read(tmp_path: Path) -> None:
    """Nothing there, nothing in it, and bytes that are not UTF-8, in text and in JSONL."""
    assert "does not exist; give stdlib, a file or folder of text" in sentence(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "leaves the training split without text" in sentence(tmp_path / "empty")
    assert "leaves the validation split" in sentence(write_jsonl(tmp_path / "some.jsonl", ["", "text"]))
    (tmp_path / "latin").write_bytes("für".encode("latin-1"))
    assert f"{tmp_path / 'latin'} is not UTF-8 text" in sentence(tmp_path / "latin")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "a"}\n{"text": "für"}\n'.encode("latin-1"))
    assert "latin.jsonl line 2 is not UTF-8 text" in sentence(tmp_path / "latin.jsonl")
    with pytest.raises(DataError, match="document 1 holds half a surrogate pair"):
        list(Tally("rows").through(["a", json.loads('"\\ud800"')]))


def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    """File and line, or file and column, and what there is instead; damaged files."""
    import pyarrow
    import zstandard
    from pyarrow import parquet

    rows = tmp_path / "rows.jsonl"
    for line, mend in (
        ('{"text": ', "is not JSON"),
        ('{"body": "x"}', "has no text in the field data.text_field='text'; it has 'body'"),
        ('{"text": 3}', "has no text in the field data.text_field='text'"),
        ('["text"]', "has no text in the field"),
    ):
        rows.write_text('{"text": "a"}\n' + line + "\n")
        assert f"{rows} line 2 {mend}" in sentence(rows)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps({"text": "a" * 1000}).encode())[:-12])
    assert f"{cut} is damaged" in sentence(cut)
    whole = zstandard.compress(json.dumps({"text": "a" * 1000}).encode())
    cut = tmp_path / "cut.jsonl.zst"
    for damaged, why in (
        (whole[:-3], "it ends within a zstandard frame"),
        (whole + whole[:5], "it ends within a zstandard frame"),
        (b"plain text, misnamed", "zstd decompressor error"),
    ):
        cut.write_bytes(damaged)
        assert f"{cut} is damaged ({why}" in sentence(cut)
    table = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"body": ["x"], "text": [1]}), table)
    assert "has no column of text named data.text_field='text'; it has 'body', 'text'" in sentence(table)
    assert "has no column of text named data.text_field='no'" in sentence(table, text_field="no")
    table.write_bytes(table.read_bytes()[:-5])
    assert f"{table} is not a whole Parquet file" in sentence(table)


@pytest.mark.parametrize("kind", ["file", "rows.jsonl", "folder"])
def test_what_may_not_be_read(tmp_path: Path, kind: str) -> None:
    """A file or folder without permission, as a user who is not root meets it."""
    place = tmp_path / kind
    place.mkdir() if kind == "folder" else place.write_text("text")
    place.chmod(0)
    tmp_path.chmod(0o755)
    code = f"""
import os
from moe.config import DataConfig
from moe.data.sources import open_source
from moe.errors import DataError
os.chdir({str(tmp_path)!r})
if os.geteuid() == 0:
    os.setuid(65534)
try:
    list(open_source({kind!r}, DataConfig()).documents("train"))
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    place.chmod(0o700)
    assert done.stdout == f"data.source: {kind} cannot be read (Permission denied); mend that or move it away\n", done
