"""Do the kernels compile here and compute what the reference computes? The self-check, then every GPU test."""

import os
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_check_part import ROOT, Part, main

NOTHING_SELECTED = 5  # pytest's exit status for files without a GPU test
# Of the part's time. It takes some seconds, or up to a minute where its kernels were never compiled.
SELF_CHECK_SHARE = 0.75
SELF_CHECK = "import moe_kernels.selfcheck; from moe_kernels import resolve; print('backend:', resolve(None, 'cuda'))"
# Without a GPU that of one op runs in Triton's interpreter, which must be chosen before triton is imported. All of them
# take it minutes, and tests/kernels runs them there.
DRY_SELF_CHECK = """
import torch
import moe_kernels.dispatch
from moe_kernels.backend import registered_checks
registered_checks()[0].run(torch.device("cpu"), torch.float32)
print("backend: interpreter")
"""


def run(part: Part) -> None:
    """Each in a process of its own: an illegal access in one poisons CUDA for all that follows in it."""
    with part.section("self-check"):
        self_check(part)
    with part.section("tests"):
        gpu_tests(part)


def self_check(part: Part) -> None:
    """What first uses do, of every op in every dtype at once, compilation included."""
    log, start = "selfcheck.log", time.monotonic()
    variables = {"TRITON_INTERPRET": "1"} if part.dry else {}
    code = DRY_SELF_CHECK if part.dry else SELF_CHECK
    status = part.child([sys.executable, "-c", code], log, part.seconds_left * SELF_CHECK_SHARE, **variables)
    elapsed_s, text = time.monotonic() - start, part.tail(log)
    backend = next((line.split(": ")[1] for line in text.splitlines() if line.startswith("backend: ")), None)
    part.put("self_check", {"exit_status": status, "backend": backend, "seconds": round(elapsed_s, 1), "tail": text})
    if status != 0:
        raise RuntimeError(f"self-check {'hangs' if status is None else f'exit status {status}'}: {text[-300:]}")
    part.say(f"self-check ok ({backend}, {elapsed_s:.0f} s)")


def gpu_tests(part: Part) -> None:
    """tests/kernels -m gpu. Cut short, it still tells what passed.

    Most of the time is compilation on the processor, so on a machine with many cores several processes share the files.
    """
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "kernels").glob("test_*.py"))
    count = min(len(files), max(1, (os.cpu_count() or 1) // 2))
    with ThreadPoolExecutor(count) as pool:
        outcomes = list(pool.map(lambda n: test_process(part, n, files[n::count]), range(count)))
    found: dict[str, Any] = {
        name: sum(outcome[name] for outcome in outcomes) for name in ("passed", "failed", "skipped")
    }
    part.put("tests", {**found, "processes": outcomes})
    counts = ", ".join(f"{number} {name}" for name, number in found.items())
    statuses = [outcome["exit_status"] for outcome in outcomes]
    part.say(f"gpu tests: {counts}" + (" before time ran out" if None in statuses else ""))
    if None in statuses:
        raise RuntimeError(f"time ran out: {counts}")
    if set(statuses) - {0, NOTHING_SELECTED} or statuses == [NOTHING_SELECTED] * count:
        raise RuntimeError(f"pytest exit status {', '.join(map(str, statuses))}: {counts}")


def test_process(part: Part, number: int, files: list[str]) -> dict[str, Any]:
    """One pytest over some files: counts, failures, exit status."""
    log, report = f"kernel_tests_{number}.log", part.keep / f"kernel_tests_{number}.xml"
    # plugins that happen to be installed, and warnings of other versions than the tested ones, are no failure here
    command = [
        sys.executable, "-m", "pytest", *files, "-m", "gpu", "-v", "-W", "default", "--tb=short",
        "-p", "no:cacheprovider", f"--junitxml={report}",
    ]  # fmt: skip
    status = part.child(command, log, part.seconds_left - 5, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    found = junit(report) if report.is_file() else verbose_counts(part.tail(log, 10**7))
    return {**found, "exit_status": status, "command": command[1:], "tail": part.tail(log)}


def junit(report: Path) -> dict[str, Any]:
    """Counts, the failures with their messages, and the slowest tests of a JUnit file."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failures, skips, times = [], 0, []
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        times.append((float(case.get("time", 0)), name))
        skips += case.find("skipped") is not None
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                failures.append({"test": name, "message": (found.get("message") or "")[:1500]})
    failed = len({failure["test"] for failure in failures})
    slowest = [{"test": name, "seconds": seconds} for seconds, name in sorted(times, reverse=True)[:10]]
    return {
        "passed": len(cases) - failed - skips, "failed": failed, "skipped": skips, "failures": failures[:60],
        "slowest": slowest,
    }  # fmt: skip


def verbose_counts(text: str) -> dict[str, Any]:
    """The same from pytest's own lines, for a pytest that was killed before it wrote its report."""
    words = {"passed": " PASSED", "failed": " FAILED", "skipped": " SKIPPED"}
    lines = [line for line in text.splitlines() if "::" in line]
    counts: dict[str, Any] = {name: sum(word in line for line in lines) for name, word in words.items()}
    return {**counts, "failures": [line for line in lines if " FAILED" in line][:60], "last_line": lines[-1:]}


if __name__ == "__main__":
    main(run)
