"""Prepared folders: the same tokens as in memory, the same bytes after a kill, and no damaged shard trained from."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moe.config import DataConfig
from moe.data.prepare import prepare
from moe.data.shards import PreparedFolder, sha256_of
from moe.data.sources import open_source
from moe.data.tokenizer import DocumentEncoder
from moe.data.tokens import tokenise_split
from moe.errors import DataError

from .conftest import documents, write_jsonl

TEXTS = documents(300)


def config_for(rows: Path, tokenizer: Path) -> DataConfig:
    return DataConfig(source=str(rows), tokenizer=str(tokenizer), validation_fraction=0.1)


@pytest.fixture
def config(tmp_path: Path, tokenizer: Path) -> DataConfig:
    """A JSONL source and a saved tokenizer; 300 documents make some 30,000 tokens."""
    return config_for(write_jsonl(tmp_path / "rows.jsonl", TEXTS), tokenizer)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def cli(*words: object) -> list[str]:
    return [sys.executable, "-m", "moe.cli", "data", "prepare", *map(str, words)]


def test_shards_hold_the_tokens_of_the_text(config: DataConfig, tmp_path: Path, tokenizer: Path) -> None:
    """The same tokens, counts and text hashes as in memory, wherever shards are cut; the tokenizer comes along."""
    source, encoder = open_source(config.source, config), DocumentEncoder(tokenizer)
    assert prepare(config, tmp_path / "out", shard_tokens=1000)
    folder = PreparedFolder(tmp_path / "out")
    found = folder.tokens(verify=True)
    for ours, split in ((found.train, "train"), (found.validation, "validation")):
        theirs = tokenise_split(source.name, source.documents(split), encoder)
        assert (ours.documents, ours.bytes, ours.sha256) == (theirs.documents, theirs.bytes, theirs.sha256)
        count = len(theirs.tokens)
        assert len(ours.tokens) == count
        for start, stop in ((0, count), (0, 1), (999, 1001), (1000, 2000), (500, 2500), (count - 1, count)):
            assert np.array_equal(ours.tokens[start:stop], theirs.tokens[start:stop])
    assert len(folder.index["train"]["shards"]) > 10
    assert {shard["tokens"] for shard in folder.index["train"]["shards"][:-1]} == {1000}
    assert folder.tokenizer.read_bytes() == tokenizer.read_bytes()
    before = contents(tmp_path / "out")
    assert not prepare(config, tmp_path / "out", shard_tokens=1000), "nothing was left to do"
    assert contents(tmp_path / "out") == before


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    """Ids beyond 65,535 are kept whole."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"</s>": 0, "low": 1, "high": 70_000}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="low"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows = write_jsonl(tmp_path / "rows.jsonl", ["low", "low high"])
    prepare(DataConfig(source=str(rows), tokenizer=str(tmp_path), validation_fraction=0.1), tmp_path / "out")
    assert PreparedFolder(tmp_path / "out").tokens(verify=True).train.tokens[0:3].tolist() == [1, 70_000, 0]


def test_a_killed_preparation_goes_on(tmp_path: Path) -> None:
    """kill -9 amid the shards: finished ones are not made again, and every byte is as if nothing had happened."""
    rows = write_jsonl(tmp_path / "rows.jsonl", documents(8_000))
    words = (rows, "--vocab-size", "300", "--shard-tokens", "33000", "--tokenizer-documents", "100", "--out")
    straight = subprocess.run(cli(*words, tmp_path / "straight"), capture_output=True, text=True, timeout=120)
    assert straight.returncode == 0, straight.stderr
    assert f"train with data.source={tmp_path / 'straight'} model.vocab_size=300" in straight.stdout
    assert "train: 7,600 documents" in straight.stdout

    out, kept = tmp_path / "killed", {}
    for shards in (2, 6):
        child = subprocess.Popen(cli(*words, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while child.poll() is None and not (out / f"train_{shards:05d}.bin").exists():
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, "it was done before the kill"
        kept |= {shard["file"]: 0 for shard in PreparedFolder.index_at(out)["train"]["shards"]}
        kept = {name: (out / name).stat().st_mtime_ns for name in kept}
    assert len(kept) >= 6
    with pytest.raises(DataError, match="is not prepared to its end; run the same `moe data prepare` again"):
        PreparedFolder(out)
    resumed = subprocess.run(cli(*words, out), capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    assert contents(out) == contents(tmp_path / "straight")
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept, "finished shards were left alone"


def test_a_preparation_is_of_one_text_and_one_setting(config: DataConfig, tmp_path: Path) -> None:
    """Going on with other settings, another text or in a folder of other things is refused."""
    out = tmp_path / "out"
    prepare(config, out, shard_tokens=1000)
    with pytest.raises(DataError, match="was begun with shard_tokens=1000, not 2000; give the same, or another folder"):
        prepare(config, out, shard_tokens=2000)
    index = PreparedFolder.index_at(out)
    begun = {"documents": 3, "tokens_of_next": 5, "text_sha256": "0" * 64, "shards": index["train"]["shards"][:1]}
    (out / "index.json").write_text(json.dumps(index | {"train": begun, "complete": False}, sort_keys=True))
    with pytest.raises(DataError, match=r"the text of .* has changed since --out .* was begun; restore it"):
        prepare(config, out, shard_tokens=1000)
    with pytest.raises(DataError, match="holds other files; give a new folder"):
        prepare(config, tmp_path)
    with pytest.raises(DataError, match="need --vocab-size N to train a tokenizer, or --tokenizer FILE"):
        prepare(config, tmp_path / "new", vocab_size=300)
    with pytest.raises(DataError, match=r"--out .* cannot be written \(Not a directory\)"):
        prepare(config, tmp_path / "rows.jsonl" / "out")


def test_a_command_that_failed_may_be_mended(config: DataConfig, tmp_path: Path) -> None:
    """Before the first shard is finished nothing holds a folder to its settings: the mended command starts anew."""
    with pytest.raises(DataError, match="is more than this corpus yields"):
        prepare(DataConfig(source=config.source), tmp_path / "out", vocab_size=50_000)
    for folder in ("out", "new"):
        assert prepare(DataConfig(source=config.source), tmp_path / folder, vocab_size=280)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_two_preparations_do_not_share_a_folder(config: DataConfig, tmp_path: Path) -> None:
    """The second one is told to wait."""
    import fcntl

    (tmp_path / "out").mkdir()
    held = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="is being prepared by another process; wait for it"):
        prepare(config, tmp_path / "out")
    os.close(held)
    assert prepare(config, tmp_path / "out")


def test_a_changed_shard_is_refused(config: DataConfig, tmp_path: Path) -> None:
    """One flipped bit, one missing byte, a missing file, a torn index: each names the file."""
    prepare(config, tmp_path / "out", shard_tokens=1000)
    folder, shard = PreparedFolder(tmp_path / "out"), tmp_path / "out" / "train_00003.bin"
    whole = shard.read_bytes()
    shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(DataError, match=r"train_00003\.bin is not what was prepared: its sha256 differs; restore it"):
        folder.tokens(verify=True)
    shard.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"train_00003\.bin has 1999 bytes and should have 2000"):
        folder.tokens(verify=False)
    shard.unlink()
    for verify in (True, False):
        with pytest.raises(DataError, match=r"train_00003\.bin cannot be read \(No such file or directory\)"):
            folder.tokens(verify=verify)
    with pytest.raises(DataError, match="cannot be read"):
        sha256_of(shard)
    index = tmp_path / "out" / "index.json"
    index.write_text(json.dumps({"format": PreparedFolder.index_at(tmp_path / "out")["format"]}))
    with pytest.raises(DataError, match=r"index\.json lacks parts of an index"):
        PreparedFolder(tmp_path / "out")
    index.write_bytes(index.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"index\.json is not JSON"):
        PreparedFolder(tmp_path / "out")


def test_a_shard_that_changes_while_it_is_read(config: DataConfig, tmp_path: Path) -> None:
    """Cut short, it is an error and no SIGBUS; deleted, what is open reads on and what is not is an error."""
    prepare(config, tmp_path / "out", shard_tokens=1000)
    tokens = PreparedFolder(tmp_path / "out").tokens(verify=False).train.tokens
    first = tokens[10:20]
    os.truncate(tmp_path / "out" / "train_00000.bin", 30)
    assert np.array_equal(tokens[10:15], first[:5])
    with pytest.raises(DataError, match=r"train_00000\.bin became shorter while it was read; restore it"):
        tokens[10:20]
    (tmp_path / "out" / "train_00000.bin").unlink()
    assert np.array_equal(tokens[10:15], first[:5])
    (tmp_path / "out" / "train_00001.bin").unlink()
    with pytest.raises(DataError, match=r"train_00001\.bin cannot be read \(No such file"):
        tokens[1500:1501]


def test_more_shards_than_files_may_be_open(config: DataConfig, tmp_path: Path) -> None:
    """Reading all of them in any order keeps only some open."""
    prepare(config, tmp_path / "out", shard_tokens=50)
    tokens = PreparedFolder(tmp_path / "out").tokens(verify=False).train.tokens
    whole = tokens[0 : len(tokens)]
    before = len(os.listdir("/proc/self/fd"))
    order = np.random.default_rng(0).permutation(len(tokens) // 50)
    assert len(order) > 300
    assert all(np.array_equal(tokens[50 * n : 50 * n + 50], whole[50 * n : 50 * n + 50]) for n in order)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
