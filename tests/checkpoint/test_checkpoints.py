"""Snapshots and their writer: what is kept, what a failing disk does, and that training cannot change a snapshot."""

import os
import resource
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moe.checkpoint import Saver, Snapshot, capture, list_checkpoints, load_checkpoint, verify, write_checkpoint
from moe.config import ModelConfig, OptimConfig
from moe.errors import CheckpointError
from moe.model import Transformer
from moe.optim import build_optimizer

CONFIG = ModelConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, kv_lora_rank=8,
    qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=8, first_k_dense_replace=1,
)  # fmt: skip


class Trained:
    """A small model with an optimizer that has moved."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Transformer(CONFIG)
        self.optimizer = build_optimizer(self.model, OptimConfig())
        self.step()

    def step(self) -> None:
        ids = torch.randint(0, 40, (2, 8))
        self.model(ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def snapshot(self, *, copy: bool) -> Snapshot:
        return capture(self.model, self.optimizer, {"tokens": 7}, copy=copy)


def _names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_newest_and_round_steps_are_kept(tmp_path: Path) -> None:
    """keep=2 and every third: 3 and 6 stay for ever, 7 and 8 for being newest; nothing half-written stays."""
    trained = Trained()
    saver = Saver(tmp_path, keep=2, keep_every_steps=3, background=False)
    (tmp_path / ".step_00000099.1").mkdir()
    for step in range(1, 9):
        saver.save(step, trained.snapshot)
    assert sorted(os.listdir(tmp_path)) == [f"step_0000000{step}" for step in (3, 6, 7, 8)]


def test_a_snapshot_is_the_run_as_it_was(tmp_path: Path) -> None:
    """Steps made while the snapshot waits to be written do not reach it: weights, moments and random state."""
    trained = Trained()
    expected = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    random = torch.get_rng_state()
    snapshot = trained.snapshot(copy=True)
    trained.step()
    write_checkpoint(tmp_path, 1, snapshot)
    other = Trained()
    other.step()
    state = load_checkpoint(tmp_path / "step_00000001", other.model, other.optimizer)
    assert state["step"] == 1
    assert state["tokens"] == 7
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.model.state_dict().items())
    before, trained_again = other, Trained()
    torch.set_rng_state(random)
    before.step()
    torch.set_rng_state(random)
    trained_again.step()
    for mine, theirs in zip(before.model.parameters(), trained_again.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)  # bitwise, so the moments and step counts were those of the snapshot


def test_the_caller_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    """In the background `save` returns while the write is still at it; the next save waits for it."""
    trained, gate = Trained(), threading.Event()
    saver = Saver(tmp_path, keep=9, keep_every_steps=None, background=True)
    saver._writer.submit(gate.wait)  # the writer is busy, as with a slow disk
    saver.save(1, trained.snapshot)
    assert _names(tmp_path) == []
    threading.Timer(0.3, gate.set).start()
    saver.save(2, trained.snapshot)
    assert _names(tmp_path)[0] == "step_00000001"
    assert saver.stall_s > 0.2  # measured, not hidden
    saver.wait()
    assert _names(tmp_path) == ["step_00000001", "step_00000002"]
    saver.close()


def test_a_failed_write_reaches_the_trainer(tmp_path: Path) -> None:
    """What the background writer could not do is raised where the run can stop; what was saved before is whole."""
    trained = Trained()
    saver = Saver(tmp_path / "checkpoints", keep=9, keep_every_steps=None, background=True)
    saver.save(1, trained.snapshot)
    saver.wait()
    (tmp_path / "checkpoints" / f".step_00000002.{os.getpid()}").write_text("in the way")
    with pytest.MonkeyPatch.context() as patch:  # a folder that cannot be made, whoever asks: root passes permissions
        patch.setattr("moe.checkpoint.files.shutil.rmtree", lambda *_, **__: None)
        saver.save(2, trained.snapshot)
        with pytest.raises(CheckpointError, match=r"step_00000002 cannot be written \(File exists\); earlier"):
            saver.wait()
    verify(tmp_path / "checkpoints" / "step_00000001")
    saver.close()


def test_a_refused_write_is_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The disk refuses one write in the background: the next save says so and is written; two in a row end the run."""
    trained = Trained()
    saver = Saver(tmp_path, keep=9, keep_every_steps=None, background=True)
    saver.save(1, trained.snapshot)
    saver.wait()
    with no_room():
        saver.save(2, trained.snapshot)
        saver._writer.submit(bool).result()  # the writer is through with it
    assert _names(tmp_path) == ["step_00000001"]
    assert capsys.readouterr().err == ""
    saver.save(3, trained.snapshot)
    said = capsys.readouterr().err
    assert f"{tmp_path}/step_00000002 cannot be written (" in said
    assert said.endswith("File too large (os error 27)); earlier checkpoints are whole; trying again at step 3\n")
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000003"]
    with no_room():
        saver.save(4, trained.snapshot)
        with pytest.raises(CheckpointError, match="step_00000005 cannot be written"):
            saver.save(5, trained.snapshot)
    assert "step_00000004 cannot be written (" in capsys.readouterr().err
    saver.save(6, trained.snapshot)
    saver.close()
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000003", "step_00000006"]
    for path in list_checkpoints(tmp_path):
        verify(path)


@contextmanager
def no_room() -> Iterator[None]:
    """The kernel refuses files of more than 4 KiB, as a full disk or a quota does, to root too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_a_folder_nobody_may_write(tmp_path: Path) -> None:
    """An ordinary user in a read-only folder, with a checkpoint whose files are root's alone: one sentence each."""
    write_checkpoint(tmp_path, 1, Trained().snapshot(copy=False))
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    tmp_path.chmod(0o555)
    code = f"""
        import os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_checkpoints import Trained, verify, write_checkpoint
        trained = Trained()
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
        folder = Path({str(tmp_path)!r})
        writing = lambda: write_checkpoint(folder, 2, trained.snapshot(copy=False))
        reading = lambda: verify(folder / "step_00000001")
        for work in (writing, reading):
            try: work()
            except Exception as error: print(type(error).__name__, error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    tmp_path.chmod(0o755)
    writing, reading = done.stdout.splitlines() or [done.stderr, ""]
    assert writing.startswith("CheckpointError"), done.stderr
    assert "step_00000002 cannot be written (Permission denied); earlier checkpoints are whole" in writing
    assert reading.startswith("CheckpointError")
    assert "cannot be read (Permission denied)" in reading
    assert _names(tmp_path) == ["step_00000001"]


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    """A flipped byte, a shorter file, a missing one, half a manifest: each is named."""
    path = write_checkpoint(tmp_path, 1, Trained().snapshot(copy=False))
    verify(path)
    file = path / ("manifest.json" if damage == "manifest" else "optimizer.safetensors")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    if damage == "flip":
        file.write_bytes(raw)
    elif damage == "delete":
        file.unlink()
    else:
        file.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match="manifest"):
        verify(path)
