"""What one forward and backward of the experts costs in joules, ours and every peer's, by the energy counter."""

from gpu_check_bench_kernels import DRY, bench
from gpu_check_part import Part, main

EACH_S = 10.0  # the counter moves ten times a second: 1 % of its end points are left
WORDS = ("--case", "qwen3-30b", "--routing", "balanced", "--energy", f"{EACH_S:g}")


def run(part: Part) -> None:
    """One shape: with seven contenders and the product it takes a minute and a half."""
    with part.section("energy"):
        bench(part, (*DRY, "--routing", "balanced", "--energy", "0.1") if part.dry else WORDS, "kernel_energy.log")
    for line in part.data.get("lines", []):
        part.say(f"{line['ours']} J, {line['ratio']} x {line['peer_name']}")


if __name__ == "__main__":
    main(run)
