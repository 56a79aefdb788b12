"""Kill a training again and again, on a GPU whose energy is known: does its ledger tell the truth?

    scripts/soak [--kills N] [--seed S]      one JSON object a kill, then one of verdicts; exit code 1 when one is no

One run is trained to its end untouched. Another loses its process group to SIGKILL at moments that the seed draws, and
is started again each time, until it ends. The GPU is that of tests/energy/fake_nvml.c, read through nvidia-ml-py; the
training is tests/trainer's tiny recipe on the processor. Ledger and metrics are looked at as bytes on the disk, beside
`moe energy`'s own fold of them.

    checkpoint   while a checkpoint's files are being written
    power cut    anywhere; then what was not fsynced goes, from a random byte on, and the machine stays off for a while
    rare         in work of ten seconds and more since the last checkpoint, all of it lost; steps are slower there
    step         anywhere
    start        from the first instant of the process to its first steps
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from soak_lives import ROOT, Soak
from soak_verdicts import Verdicts


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-a-kill", type=int, default=80)
    options = parser.parse_args(words)
    sys.path.insert(0, str(ROOT / "tests" / "energy"))  # the fake node is the tests' own
    from fake_node import FakeGpu, FakeNode, compile_library

    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        node = FakeNode(compile_library(folder), folder)
        gpu = node.set(FakeGpu(power1_mw=317_123, power2_mw=683_001, period_ns=1_300_000_000))
        soak = Soak(folder, node.env, gpu, **vars(options))
        soak.run()
        verdicts = Verdicts(soak)
    print(json.dumps({"seed": options.seed, **verdicts.numbers, "holds": verdicts.holds}, indent=2))
    return 0 if all(verdicts.holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
