"""The energy of nodes held against the sum of their devices, over the time both are known for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from moe.energy.file_fold import FileFold
from moe.energy.fold import Fold
from moe.energy.node.series import NodeSeries, Piece
from moe.energy.sources.pm_counters import NODE_BAND
from moe.energy.timeline import Segment
from moe.errors import ConfigError

__all__ = ["NodeReconciliation", "node_readings", "reconcile"]

FULL_COVERAGE = 0.95


@dataclass(frozen=True, kw_only=True)
class NodeReconciliation:
    """A run's nodes and its devices over the same time. Joules are of that time alone, not of the whole run.

    elapsed_s     metered time of the run, summed over nodes; `coverage` is the share for which the node is known too
    longest_gap_s the longest stretch of it without
    device_j      what the ledger's devices used, node_j what the nodes did, their devices inside
    unseen_j      the difference, and `unseen_share` its share of node_j: processors, memory, network, fans, losses
    edge_j        energy of node intervals that only partly lie in the metered time, shared out by time
    band_j        of node_j: the default gain of a node's sensor, and what may have been shared out wrongly when each
                  part of an interval at the edge drew between nothing and twice its mean power
    pieces        node_j by time, each piece used evenly
    notes         what a reader of the numbers should see
    """

    source: str
    hosts: list[str]
    elapsed_s: float
    coverage: float
    longest_gap_s: float
    device_j: float
    node_j: float
    unseen_j: float
    unseen_share: float | None
    edge_j: float
    band_j: float
    pieces: list[Piece]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """All but the pieces."""
        return {name: value for name, value in vars(self).items() if name != "pieces"}


def node_readings(fold: Fold) -> list[NodeSeries]:
    """The series that the meter itself kept in the ledgers, one a segment; [] where it found no node counter."""
    return [
        NodeSeries.from_counter(
            segment.header["node_source"],
            segment.header["host"],
            [(at_ns + segment.utc_offset_ns, energy_mj / 1000) for at_ns, energy_mj in segment.node_points],
        )
        for file in fold.files
        for segment in file.segments
        if "node_source" in segment.header
    ]


def reconcile(fold: Fold, series: Sequence[NodeSeries]) -> NodeReconciliation:
    """Join node series with a run by host and time. Raises ConfigError where they cannot belong together.

    Hosts are compared by their name up to the first dot. A series without host is of the run's one host, or, from
    SLURM, of all of them together. A host without series is metered time that its node is not known for.
    """
    if not series:
        raise ConfigError(f"{fold.files[0].path} holds no readings of its node: give a file of them")
    groups = _match(fold, series)
    elapsed_ns = covered_ns = longest_ns = 0
    device_j = node_j = edge_j = doubt_j = 0.0
    joined: list[Piece] = []
    for members, segments in groups:
        pieces = sorted((piece for one in members for piece in one.pieces), key=lambda piece: piece.start_ns)
        if any(after.start_ns < before.end_ns for before, after in pairwise(pieces)):
            raise ConfigError("two series tell of one node at the same time: give one of them, or the host of each")
        for start_ns, end_ns in _merged(segments):
            elapsed_ns += end_ns - start_ns
            known_until_ns = start_ns
            for piece in pieces:
                share = piece.share(start_ns, end_ns)
                if not share:
                    continue
                from_ns, until_ns = max(start_ns, piece.start_ns), min(end_ns, piece.end_ns)
                longest_ns = max(longest_ns, from_ns - known_until_ns)
                known_until_ns = max(known_until_ns, until_ns)
                covered_ns += until_ns - from_ns
                node_j += piece.energy_j * share
                joined.append(Piece(from_ns, until_ns, piece.energy_j * share))
                edge_j += piece.energy_j if share < 1 else 0.0
                doubt_j += piece.energy_j * min(share, 1 - share)
                device_j += sum(_used_j(segment, from_ns, until_ns) for segment in segments)
            longest_ns = max(longest_ns, end_ns - known_until_ns)
    if not covered_ns:
        raise ConfigError("the node's readings and the run have no time in common: check the clock and zone of both")
    coverage = covered_ns / elapsed_ns
    return NodeReconciliation(
        source="+".join(sorted({one.source for members, _ in groups for one in members})),
        hosts=sorted({segment.header["host"] for _, segments in groups for segment in segments}),
        elapsed_s=elapsed_ns / 1e9,
        coverage=coverage,
        longest_gap_s=longest_ns / 1e9,
        device_j=device_j,
        node_j=node_j,
        unseen_j=node_j - device_j,
        unseen_share=1 - device_j / node_j if node_j else None,
        edge_j=edge_j,
        band_j=node_j * NODE_BAND + doubt_j,
        pieces=joined,
        notes=_without_series(groups) + _notes(fold, coverage, device_j, node_j, edge_j),
    )


def _match(fold: Fold, series: Sequence[NodeSeries]) -> list[tuple[list[NodeSeries], list[Segment]]]:
    """Which series belong to which segments."""
    by_host: dict[str, list[Segment]] = {}
    for file in fold.files:
        for segment in _read_segments(file):
            by_host.setdefault(_short(segment.header["host"]), []).append(segment)
    everything = [segment for segments in by_host.values() for segment in segments]
    if any(one.source == "node:slurm" for one in series):
        return [(list(series), everything)]
    if len(by_host) > 1 and any(one.host is None for one in series):
        raise ConfigError(f"the run used the hosts {', '.join(sorted(by_host))}: give each reading its host")
    named: dict[str, list[NodeSeries]] = {}
    for one in series:
        named.setdefault(_short(one.host or next(iter(by_host), "")), []).append(one)
    if not named.keys() & by_host.keys():
        raise ConfigError(
            f"the readings are of {', '.join(sorted(named)) or 'no host'}, the run used {', '.join(sorted(by_host))}"
        )
    return [(named.get(host, []), segments) for host, segments in by_host.items()]


def _read_segments(file: FileFold) -> Iterator[Segment]:
    return (segment for segment in file.segments if any(len(line.times_ns) > 1 for line in segment.lines.values()))


def _short(host: str) -> str:
    """A host's name up to the first dot, fit to be printed: it comes from files."""
    return "".join(c for c in host.partition(".")[0].lower() if c.isprintable())


def _merged(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """The UTC stretches between first and last reading of any segment, those that overlap joined."""
    spans = sorted(
        (
            min(line.times_ns[0] for line in segment.lines.values() if line.times_ns) + segment.utc_offset_ns,
            max(line.times_ns[-1] for line in segment.lines.values() if line.times_ns) + segment.utc_offset_ns,
        )
        for segment in segments
    )
    merged: list[tuple[int, int]] = []
    for start_ns, end_ns in spans:
        if merged and start_ns <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end_ns))
        else:
            merged.append((start_ns, end_ns))
    return merged


def _used_j(segment: Segment, from_ns: int, until_ns: int) -> float:
    """What a segment's devices used between two moments of UTC."""
    begin, end = (moment - segment.utc_offset_ns for moment in (from_ns, until_ns))
    return sum(line.energy_at(end) - line.energy_at(begin) for line in segment.lines.values()) / 1000


def _without_series(groups: list[tuple[list[NodeSeries], list[Segment]]]) -> list[str]:
    missing = sorted({_short(segments[0].header["host"]) for members, segments in groups if not members})
    return [f"no readings of {', '.join(missing)}: what it used is in neither sum"] if missing else []


def _notes(fold: Fold, coverage: float, device_j: float, node_j: float, edge_j: float) -> list[str]:
    notes = []
    if coverage < FULL_COVERAGE:
        notes.append(f"the node is known for {coverage:.1%} of the metered time: both sums are of that time alone")
    if device_j > node_j:
        notes.append("the devices used more than the node they are in: the clocks differ, or it is another node")
    if node_j and edge_j > (1 - FULL_COVERAGE) * node_j:
        notes.append("the node's intervals are long against the run: energy at its ends was shared out by time")
    if not fold.total.measured:
        notes.append("the devices' energy is time x declared power")
    return notes
