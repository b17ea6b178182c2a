"""The table of a benchmark: rows that are printed and written as they come."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from teacache.base import interruption
from teacache.base.errors import reason
from teacache.base.files import written_whole
from teacache.comparison.tables import markdown_table
from teacache.results.record import versions, write_json

HEADINGS = ["figure", "measured", "allocated (GiB)", "reserved (GiB)", "notes"]


@dataclass
class Row:
    """A figure.

    Attributes:
        seconds: each measurement; none of a figure that failed.
        allocated, reserved: peaks of torch's memory on the GPU in bytes; None on a CPU.
    """

    seconds: list[float] = field(default_factory=list)
    allocated: int | None = None
    reserved: int | None = None
    notes: str = ""
    figure: str = ""
    failed: bool = False

    def cells(self) -> list[str]:
        """The row's line in the table; of an even number of measurements the upper median."""
        shown = [f"{n:.3g} s" if n >= 0.1 else f"{n * 1e3:.3g} ms" for n in sorted(self.seconds)]
        median = shown[len(shown) // 2] if shown else ""
        spread = f" ({shown[0]} to {shown[-1]})" if len(shown) > 1 else ""
        memory = [f"{n / 2**30:.2f}" if n else "" for n in (self.allocated, self.reserved)]
        return [self.figure, f"{median}{spread}", *memory, self.notes]


def in_words(seconds: dict[str, float]) -> str:
    """The seconds of stages in one line."""
    return ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())


class Table:
    """The rows so far, and the files that hold them.

    Args:
        stem: path of the `.md` and the `.json` without these endings, which are written again with
            each row, in case the benchmark is killed.

    Attributes:
        about: lines above the table, by their title. texts: paragraphs below it.
    """

    def __init__(self, stem: Path):
        self.stem = stem
        self.about: dict[str, str] = {}
        self.rows: list[Row] = []
        self.texts: list[str] = []

    def describe(self, device: str) -> None:
        """Add the machine and the date to the head."""
        packages = ", ".join(f"{name} {version}" for name, version in versions().items())
        date = datetime.date.today().isoformat()
        self.about |= {"device": device, "date": date, "versions": packages}

    def measure(self, figure: str, work: Callable[[], Row]) -> bool:
        """Add the row that `work` returns, or one with its error. Returns whether it succeeded."""
        try:
            row = work()
        except Exception as error:
            interruption.check()  # some libraries turn an interruption into an error of their own
            row = Row(notes=f"failed: {reason(error)}", failed=True)
        row.figure = figure
        self.add(row)
        return not row.failed

    def add(self, row: Row) -> None:
        """Add a row; print it on standard error; write the files."""
        self.rows.append(row)
        print("  ".join(filter(None, row.cells())), file=sys.stderr, flush=True)
        self._write()

    def take(self, data: dict[str, Any]) -> None:
        """Take over the `.json` of another process, which has printed its rows."""
        self.about |= data["about"]
        self.rows += [Row(**row) for row in data["rows"]]
        self.texts += data["texts"]
        self._write()

    def _write(self) -> None:
        rows = [asdict(row) for row in self.rows]
        with written_whole(self.stem, ".md", ".json") as (table, figures):
            table.write_text(self.markdown() + "\n", encoding="utf-8")
            write_json({"about": self.about, "rows": rows, "texts": self.texts}, figures)

    def markdown(self) -> str:
        """The whole report."""
        head = "\n".join(f"- {name}: {value}" for name, value in self.about.items())
        table = markdown_table([HEADINGS, *(row.cells() for row in self.rows)])
        return "\n\n".join(["# Benchmark", head, table, *self.texts])
