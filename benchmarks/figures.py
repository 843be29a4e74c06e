"""What the benchmarks measured (`results/*.json`), what it is held against, and docs/benchmarks.md that tells of both.

A benchmark calls `record`; only the figures that it measured change. `python -m benchmarks.figures` writes the page
and its picture.
"""

import argparse
import datetime
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from benchmarks.aims import AIMS, Aim
from pydantic import BaseModel, ConfigDict

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
PAGE: Final = ROOT / "docs" / "benchmarks.md"
PICTURE: Final = ROOT / "docs" / "images" / "benchmarks.svg"
Area = Literal["trainer", "operator"]


class Figure(BaseModel):
    """One measured figure, beside a peer's of the same run where there is one."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    ours: float
    """The median of the runs, in the unit of the aim with the same key."""
    peer: float | None = None
    """The peer's median, in the same unit."""
    peer_name: str = ""
    """As in `transformers + peft 0.18`."""
    runs: int
    """Of each side."""
    spread: float = 0.0
    """(largest - smallest) / median of our runs."""
    load: float
    """The load average over a minute when the runs began, their own load left out."""
    command: str
    """What measures it again."""
    machine: str = ""
    date: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours divided by the peer's."""
        return None if self.peer is None else self.ours / self.peer


class Table(BaseModel):
    """Figures that no aim speaks of: a table of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str
    note: str = ""
    """What one must know to read it."""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    command: str
    machine: str = ""
    date: str = ""


class Results(BaseModel):
    """A file of results/."""

    model_config = ConfigDict(extra="forbid")
    figures: dict[str, Figure] = {}
    tables: dict[str, Table] = {}


def machine() -> str:
    """This machine in words: cores, processor, its widest vectors, memory."""
    about = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in about.splitlines() if line.startswith("model name")), "")
    flags = about.split("flags", 1)[-1].split("\n", 1)[0].split()
    widest = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "no AVX2")
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {model or platform.machine()} ({widest}), {gib:.0f} GiB"


def figure(
    ours: Sequence[float], peer: Sequence[float] = (), *, load: float, command: str, peer_name: str = ""
) -> Figure:
    """The figure of the runs' values."""
    middle = statistics.median(ours)
    return Figure(
        ours=middle,
        peer=statistics.median(peer) if peer else None,
        peer_name=peer_name,
        runs=len(ours),
        spread=(max(ours) - min(ours)) / middle if middle else 0.0,
        load=load,
        command=command,
    )


def read(area: Area) -> Results:
    """What was measured so far."""
    path = RESULTS / f"{area}.json"
    return Results.model_validate_json(path.read_text()) if path.exists() else Results()


def record(area: Area, figures: dict[str, Figure], tables: dict[str, Table] | None = None) -> None:
    """Keep what was measured now beside what was measured before.

    Raises:
        KeyError: no aim has the figure's key.
    """
    known = {aim.key for aim in AIMS[area]}
    for key in figures:
        if key not in known:
            raise KeyError(f"benchmarks/aims.py has no aim {key!r} in {area!r}")
    stamp = {"machine": machine(), "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    results = read(area)
    results.figures.update({key: one.model_copy(update=stamp) for key, one in figures.items()})
    results.tables.update({key: one.model_copy(update=stamp) for key, one in (tables or {}).items()})
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{area}.json").write_text(results.model_dump_json(indent=1, exclude_defaults=True) + "\n")


def page() -> str:
    """docs/benchmarks.md."""
    parts = [_HEAD]
    areas: tuple[tuple[Area, str], ...] = (("trainer", "The trainer"), ("operator", "The operator"))
    for area, title in areas:
        results = read(area)
        parts += [f"## {title}\n", *_aims(AIMS[area], results)]
        for key in sorted(results.tables):
            parts += _table(results.tables[key])
    return "\n".join(parts)


_HEAD: Final = """\
# Benchmarks

What Kubetune reaches, beside what a user would take instead, and where it loses. Both sides run in turns in one session
on the same machine, each in a fresh process on the same weights and tokens; a figure is the median of its runs, a ratio
is ours divided by the peer's. Runs that another program disturbed are made again. Each row names the command that
measures it again; `python -m benchmarks.figures` writes this page from `benchmarks/results`.

![Ratios to the peers](images/benchmarks.svg)
"""


def _aims(aims: Sequence[Aim], results: Results) -> list[str]:
    lines = [
        "| what | aim | ours | peer | ratio | reached | runs, spread |",
        "| --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    missed, sources = [], []
    for aim in aims:
        found = results.figures.get(aim.key)
        if found is None:
            lines.append(f"| {aim.what} | {aim.words()} | not measured yet |  |  |  |  |")
            continue
        peer = "" if found.peer is None else f"{_number(found.peer)} {aim.unit} ({found.peer_name})"
        ratio = "" if found.ratio is None else f"{found.ratio:.2f}"
        reached = aim.reached(found.ours, found.ratio)
        lines.append(
            f"| {aim.what} | {aim.words()} | {_number(found.ours)} {aim.unit} | {peer} | {ratio} "
            f"| {'yes' if reached else '**no**'} | {found.runs}, {found.spread:.0%} |"
        )
        sources.append((found.command, found.machine, found.date, aim.what))
        if not reached:
            missed.append(f"- **{aim.what}**: {aim.why or 'the reason is not known yet.'}")
    lines.append("")
    if missed:
        lines += ["Where the aim is missed:", "", *missed, ""]
    return lines + _commands(sources)


def _commands(sources: list[tuple[str, str, str, str]]) -> list[str]:
    """Which command measured which rows, where and when."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for command, where, date, what in sources:
        rows.setdefault((command, where, date), []).append(what)
    return [
        line
        for (command, where, date), whats in rows.items()
        for line in (f"`{command}` ({where}, {date}): {'; '.join(whats)}.", "")
    ]


def _table(table: Table) -> list[str]:
    lines = [f"### {table.title}", ""]
    if table.note:
        lines += [table.note, ""]
    lines += ["| " + " | ".join(table.columns) + " |", "| --- |" + " ---: |" * (len(table.columns) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in table.rows]
    return [*lines, "", f"`{table.command}` ({table.machine}, {table.date})", ""]


def _number(value: float) -> str:
    """Three digits that mean something."""
    if value and abs(value) < 1:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def picture(path: Path) -> None:
    """A bar for each ratio, with a mark at its aim."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kubetune"  # the same bytes for the same figures
    from matplotlib import pyplot

    rows = [
        (aim, ratio)
        for area in AIMS
        for aim in AIMS[area]
        if (found := read(area).figures.get(aim.key)) and (ratio := found.ratio) is not None and aim.of == "ratio"
    ]
    drawing, axes = pyplot.subplots(figsize=(8, 0.5 + 0.42 * max(len(rows), 1)), layout="constrained")
    for place, (aim, ratio) in enumerate(reversed(rows)):
        axes.barh(place, ratio, color="#326ce5" if aim.reached(0.0, ratio) else "#d9822b", height=0.6)
        axes.plot([aim.bound, aim.bound], [place - 0.4, place + 0.4], color="black", linewidth=2)
    axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [aim.what for aim, _ in reversed(rows)])
    axes.set_xlabel("Kubetune divided by the peer; the black mark is the aim")
    drawing.savefig(path, metadata={"Date": None})
    pyplot.close(drawing)


def main() -> None:
    """Write the page and the picture."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page())
    picture(PICTURE)
    print(f"{PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)} are written", file=sys.stderr)


if __name__ == "__main__":
    main()
