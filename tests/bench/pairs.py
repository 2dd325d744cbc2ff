"""Interleaved pairs: A, B, A, B, ... in one run, medians of ratios, CPU of the server per I/O."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from tests.bench.servers import Server


@dataclass(frozen=True)
class Sample:
    """One timed run of a load against one server."""

    iops: float
    p50_us: float  # latency
    p99_us: float
    cpu_us: float  # of the server, per I/O
    client_cpu_us: float = 0.0  # of the load generator, per I/O; 0 not measured


@dataclass
class Row:
    """One line of the table. Ratios are ours / peer, one per pair."""

    name: str
    peer: str
    must: str
    aim: str
    ours: list[Sample] = field(default_factory=list)
    theirs: list[Sample] = field(default_factory=list)

    def ratios(self, of: Callable[[Sample], float]) -> list[float]:
        return [of(a) / of(b) for a, b in zip(self.ours, self.theirs, strict=True) if of(b)]

    def ratio(self, of: Callable[[Sample], float]) -> float:
        return statistics.median(self.ratios(of))


def iops(sample: Sample) -> float:
    return sample.iops


def cpu(sample: Sample) -> float:
    return sample.cpu_us


def p50(sample: Sample) -> float:
    return sample.p50_us


Load = Callable[[Server, float], Sample]  # (server, seconds)
S = TypeVar("S")


def measure(row: Row, ours: S, theirs: S, load: Callable[[S, float], Sample], pairs: int, seconds: float) -> Row:
    """One warm-up of each, then `pairs` interleaved pairs."""
    for server in (ours, theirs):
        load(server, min(seconds, 1.0))
    for _ in range(pairs):
        row.ours.append(load(ours, seconds))
        row.theirs.append(load(theirs, seconds))
    return row
