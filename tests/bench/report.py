"""The measured figures as a Markdown table and a picture (SVG)."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path

from tests.bench.pairs import Row, cpu, iops, p50
from tests.bench.scale import Fact

RESULTS = Path(__file__).resolve().parent / "results"


def figure(text: str) -> float:
    """ "2.5x" -> 2.5; "" for a row that has no floor -> 0"""
    return float(text.rstrip("x") or 0)


def line(row: Row) -> str:
    ratios = row.ratios(iops)
    ours, theirs = (statistics.median(s.iops for s in side) for side in (row.ours, row.theirs))
    cpus = [statistics.median(s.cpu_us for s in side) for side in (row.ours, row.theirs)]
    clients = [statistics.median(s.client_cpu_us for s in side) for side in (row.ours, row.theirs)]
    client = f"{clients[0]:.2f} / {clients[1]:.2f}" if clients[0] else ""
    state = "" if not row.must else "reached" if row.ratio(iops) >= figure(row.must) else "SHORT"
    return (
        f"| {row.name} | {row.peer} | {ours:,.0f} / {theirs:,.0f} | **{row.ratio(iops):.2f}x** "
        f"({min(ratios):.2f}..{max(ratios):.2f}) | {row.must} / {row.aim} | {state} | "
        f"{cpus[0]:.2f} / {cpus[1]:.2f} = {row.ratio(cpu):.2f}x | {client} | {row.ratio(p50):.2f}x |"
    )


ONE_MACHINE = "server on CPU 1, load on CPU 0; page cache; same files."


def table(rows: list[Row], facts: list[Fact], where: str = ONE_MACHINE) -> str:
    lines = [
        f"Linux {platform.release()}, {os.cpu_count()} cores; {where}",
        "",
        "| row | peer | IOPS ours / peer | ratio (min..max) | must / aim | | server CPU us per I/O | client's "
        "| p50 ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(line(row) for row in rows),
        "",
        "| fact | measured | must / aim | |",
        "| --- | --- | --- | --- |",
        *(f"| {f.name} | {f.text} | {f.must} / {f.aim} | {'reached' if f.reached else 'SHORT'} |" for f in facts),
    ]
    return "\n".join(lines) + "\n"


def picture(rows: list[Row]) -> str:
    """A bar a row: our IOPS over the peer's; the tick is the floor ("must")."""
    height, left, scale = 26, 330, 110
    top = 40 + height * len(rows)
    size = f'width="{left + 7 * scale}" height="{top + 20}"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">']
    out.append('<text x="10" y="22" font-size="15">IOPS, ours over the peer (tick: the floor)</text>')
    for number, row in enumerate(rows):
        y = 36 + number * height
        ratio = row.ratio(iops)
        color = "#2a7f62" if ratio >= figure(row.must) else "#b5483a"
        out.append(f'<text x="10" y="{y + 15}" font-size="12">{row.name} / {row.peer}</text>')
        out.append(f'<rect x="{left}" y="{y + 3}" width="{min(ratio, 6) * scale:.0f}" height="16" fill="{color}"/>')
        out.append(f'<text x="{left + min(ratio, 6) * scale + 6:.0f}" y="{y + 15}" font-size="12">{ratio:.2f}x</text>')
        tick = left + figure(row.must) * scale
        out.append(f'<line x1="{tick:.0f}" x2="{tick:.0f}" y1="{y}" y2="{y + 22}" stroke="#222" stroke-width="2"/>')
    out.append("</svg>")
    return "\n".join(out) + "\n"


def write(text: str, rows: list[Row], prefix: str = "") -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{prefix}table.md").write_text(text)
    (RESULTS / f"{prefix}ratios.svg").write_text(picture(rows))
