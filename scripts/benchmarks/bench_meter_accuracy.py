"""The energy meter against scripted power: how far it is off, and whether its band holds the truth.

    scripts/bench meter-accuracy [--seed N] [--peers PYTHON]

Windows of 0.5 to 90 s in real time, some 100 s long, on GPUs of a fake libnvidia-ml.so.1 whose energy is known exactly:
counters, and chips without one whose power is integrated, as a mean over a second or of 25 ms in 100. Groups `gain`
have sensors up to 5 % off; a line of theirs counts the windows whose band holds the truth (goal: 99 %). In the group
`counter, gain 1` the counter itself is right, and a line tells the largest error (goal: 0.5 % from ten seconds on, from
a minute on 0.1 %). Of the bands the config has the largest ratio to 5 % + 2 x 0.1 s x P_max / E (goal for counters: 1).

--peers: a Python in which Zeus, CodeCarbon or both are installed. They and our meter then measure the same windows of
the same kinds of GPU, one after the other in three runs; what cannot be measured is said on stderr.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence

from measure import hardware, note, print_line
from meter_outcomes import Outcome, ToolFailedError, errors, measure, quantile, share_covered, widths
from meter_scenarios import FakeGpu, Span, gpus, sequence, spans

LENGTHS_S = {0.5: 4, 1: 4, 2: 4, 5: 4, 10: 6, 20: 3, 30: 2, 60: 3, 90: 1}  # how many windows of each
WITHIN_S = 100.0
GROUPS = {"counter, gain 1": 24, "counter, gain": 40, "average, gain": 15, "instant, gain": 15}  # how many GPUs of each
GOALS = {10.0: 0.005, 60.0: 0.001}  # largest error of a counter with gain 1, from so many seconds on
GOAL_COVERED = 0.99
PEER_LENGTHS_S = {0.5: 5, 1: 5, 2: 4, 5: 3, 10: 2, 30: 1}
PEER_GPUS = 12
PEER_GROUPS = ("counter, gain 1", "average, gain 1", "instant, gain 1")
PEERS = ("zeus", "codecarbon")  # tools, by the names of their distributions


def make(group: str, number: int, seed: int, epoch_ns: int) -> list[FakeGpu]:
    """The GPUs of one group."""
    chip, gain = group.split(", ")
    return gpus(chip, number, seed, epoch_ns, exact=gain == "gain 1")


def goal_of(length_s: float) -> float | None:
    """The largest error allowed to a counter with gain 1."""
    return next((goal for least_s, goal in reversed(GOALS.items()) if length_s >= least_s), None)


def run_alone(seed: int) -> None:
    """Our meter on every group at once, a line for each group and length."""
    told = measure(
        "ours", sys.executable,
        lambda epoch_ns: [gpu for group, number in GROUPS.items() for gpu in make(group, number, seed, epoch_ns)],
        spans(LENGTHS_S, WITHIN_S, seed),
    )  # fmt: skip
    for group in GROUPS:
        names = {gpu.uuid for gpu in make(group, GROUPS[group], seed, 10**12)}
        mine = [one for one in told if one.uuid in names]
        for length_s in LENGTHS_S:
            _print_group(group, length_s, [one for one in mine if one.length_s == length_s], seed)
        _print_group(group, None, mine, seed)


def _print_group(group: str, length_s: float | None, told: Sequence[Outcome], seed: int) -> None:
    case = f"{group}/{'all' if length_s is None else f'{length_s:g} s'}"
    worst, goal = errors(told)[-1], None if length_s is None else goal_of(length_s)
    config = {**_numbers(told), "length_s": length_s, "seed": seed}
    if group.endswith("gain"):
        covered = share_covered(told)
        print_line(
            "meter-accuracy", case, ours=covered, peer=GOAL_COVERED, peer_name="goal", unit="share of windows covered",
            ratio=covered / GOAL_COVERED, floor_fraction=None, hardware=hardware(), config=config,
        )  # fmt: skip
    else:
        print_line(
            "meter-accuracy", case, ours=worst, peer=goal, peer_name="goal" if goal else "no goal",
            unit="error, largest", ratio=goal / worst if goal else None, floor_fraction=None, hardware=hardware(),
            config=config,
        )  # fmt: skip


def run_peers(python: str, seed: int) -> None:
    """Each tool in its turn, and a line for each peer and length: median errors, side by side."""
    versions = {peer: _version(python, peer) for peer in PEERS}
    for peer in [peer for peer, version in versions.items() if not version]:
        note(f"bench meter-accuracy: {peer} is not installed in {python}")
        del versions[peer]
    plan = sequence(PEER_LENGTHS_S, seed)
    for group in PEER_GROUPS if versions else ():
        ours = _try("ours", sys.executable, group, plan, seed)
        for peer, version in versions.items():
            theirs = _try(peer, python, group, plan, seed)
            for length_s in PEER_LENGTHS_S if theirs else ():
                sides = [[one for one in side if one.length_s == length_s] for side in (ours, theirs)]
                a, b = (quantile(errors(side), 0.5) for side in sides)
                print_line(
                    "meter-accuracy", f"{group}/{length_s:g} s/{peer}", ours=a, peer=b, peer_name=f"{peer} {version}",
                    unit="error, median", ratio=b / a, floor_fraction=None, hardware=hardware(),
                    config={
                        "ours": _numbers(sides[0]), "theirs": _numbers(sides[1]), "length_s": length_s, "seed": seed,
                    },
                )  # fmt: skip


def _try(tool: str, python: str, group: str, plan: Sequence[Span], seed: int) -> list[Outcome]:
    try:
        return measure(tool, python, lambda epoch_ns: make(group, PEER_GPUS, seed, epoch_ns), plan)
    except ToolFailedError as error:
        note(f"bench meter-accuracy: {tool} cannot measure `{group}`: {error}")
        return []


def _version(python: str, distribution: str) -> str:
    """Of an installed distribution; empty when there is none."""
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def _numbers(told: Sequence[Outcome]) -> dict[str, float | int | None]:
    found, banded = errors(told), told[0].band_j is not None
    return {
        "windows": len(told),
        "error_median": quantile(found, 0.5),
        "error_p99": quantile(found, 0.99),
        "error_max": found[-1],
        "covered": share_covered(told) if banded else None,
        "band_median": quantile(sorted(one.band for one in told), 0.5) if banded else None,
        "width_max": widths(told)[-1] if banded else None,
    }


def main(words: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", metavar="PYTHON", help="where Zeus and CodeCarbon are installed")
    options = parser.parse_args(words)
    run_alone(options.seed)
    if options.peers:
        run_peers(options.peers, options.seed)


if __name__ == "__main__":
    main()
