"""Run directories made by hand: curves, clocks and counters are simple lines, so that every cost is known exactly.

A run trains `rate` tokens a second on devices of `power_w` each, so reaching N tokens costs `devices * N / rate`
device-seconds and `power_w` times as many joules, in each segment counted from its own start.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

TOKENS_PER_STEP = 128

MODEL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "attention": "gqa",
}


Evaluation = tuple[int, float] | tuple[int, float, float | None]
"""(tokens, loss in nats per token, its standard error: 0 when left out, not recorded when None)."""

Part = tuple[int, int, Sequence[Evaluation]]
"""One segment: resumed at so many tokens, trained to so many, with these evaluations."""


def _ledger(
    path: Path, parts: Sequence[Part], rate: float, power_w: float, devices: list[dict[str, Any]], read_until: float
) -> None:
    from moe.energy.ledger import LedgerWriter

    for index, (start, end, _) in enumerate(parts):
        writer = LedgerWriter(path)
        start_ns = _start_ns(index)
        end_ns = start_ns + round((end - start) / rate * 1e9)
        writer.append(
            "segment",
            at_ns=start_ns,
            boot_id=f"boot-{index}",
            host="bench",
            pid=1,
            started_boottime_ns=start_ns,
            interval_s=1.0,
            flush_s=5.0,
            resumed_step=start // TOKENS_PER_STEP,
            resumed_tokens=start,
            devices=devices,
        )
        read_ns = start_ns + round((end_ns - start_ns) * read_until)  # the last valid reading of a sensor that fails
        for at_ns, energy_mj in ((start_ns, 0), (read_ns, round((read_ns - start_ns) * power_w / 1e6))):
            for device in devices:
                writer.append("reading", at_ns=at_ns, device=device["uuid"], energy_mj=energy_mj)
        writer.append("end", at_ns=end_ns, reason="stopped")
        writer.close()


def _start_ns(segment: int) -> int:
    return (1 + segment) * 1_000_000_000_000_000


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Factory of run directories; see the module's docstring."""

    def make(
        name: str,
        evaluations: Sequence[Evaluation] = (),
        *,
        parts: Sequence[Part] | None = None,
        rate: float = 1.0,
        power_w: float = 100.0,
        uuids: Sequence[str] = ("GPU-0",),
        source: str = "counter",
        scope: str = "gpu",
        band: float = 0.0,
        tick_s: float = 0.0,
        read_until: float = 1.0,
        validation: str = "v",
        tokenizer: str = "t",
        bits: float | None = 0.5,
        model: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        validation_tokens: int | None = None,
        sequences: int | None = None,
        environment: dict[str, Any] | None = None,
        ledger: bool = True,
    ) -> Path:
        root = tmp_path / name
        root.mkdir(parents=True)
        parts = parts or [(0, evaluations[-1][0] if evaluations else TOKENS_PER_STEP, evaluations)]
        config = {"run": {"name": "x"}, "model": MODEL | (model or {}), "train": train or {}}
        (root / "config.json").write_text(json.dumps(config))
        data: dict[str, Any] = {"validation_sha256": validation, "tokenizer_sha256": tokenizer, "train_sha256": "train"}
        if validation_tokens is not None:
            data["validation_tokens"] = validation_tokens
        (root / "data.json").write_text(json.dumps(data))
        (root / "environment.json").write_text(
            json.dumps(
                {"world_size": len(uuids), "device_type": "cuda", "device_name": "Test GPU"} | (environment or {})
            )
        )
        with (root / "metrics.jsonl").open("w") as file:
            for index, (start, _, points) in enumerate(parts):
                stamp = {"segment": index, "utc": "2026-01-01T00:00:00Z", "boottime_ns": _start_ns(index)}
                step = start // TOKENS_PER_STEP
                file.write(json.dumps({**stamp, "resumed_step": step, "train/step": step}) + "\n")
                for tokens, loss, *error in points:
                    row = {
                        **stamp,
                        "boottime_ns": _start_ns(index) + round((tokens - start) / rate * 1e9),
                        "train/step": tokens // TOKENS_PER_STEP,
                        "train/tokens": tokens,
                        "train/loss": loss,
                        "eval/loss": loss,
                        "eval/loss_se": error[0] if error else 0.0,
                    }
                    if row["eval/loss_se"] is None:
                        del row["eval/loss_se"]
                    if sequences is not None:
                        row["eval/sequences"] = float(sequences)
                    if bits is not None:
                        row["eval/bits_per_byte"] = loss * bits
                    file.write(json.dumps(row) + "\n")
        if ledger:
            devices = [
                {
                    "uuid": uuid,
                    "name": "Test GPU",
                    "kind": "gpu",
                    "source": source,
                    "scope": scope,
                    "band": band,
                    "tick_s": tick_s,
                    "p_max_w": power_w,
                    "note": None,
                }
                for uuid in uuids
            ]
            _ledger(root / "ledger.jsonl", parts, rate, power_w, devices, read_until)
        return root

    return make


@pytest.fixture
def steps() -> Callable[..., list[Evaluation]]:
    """`steps(4.0, 3.0, error=0.1)`: evaluations every 1280 tokens with these losses."""

    def make(*losses: float, error: float | None = 0.0) -> list[Evaluation]:
        return [(1280 * (index + 1), loss, error) for index, loss in enumerate(losses)]

    return make
