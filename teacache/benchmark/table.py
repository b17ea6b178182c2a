"""The table of a benchmark: rows that are printed and written as they come."""

from __future__ import annotations

import datetime
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from teacache.base import interruption
from teacache.base.errors import TeaCacheError, reason
from teacache.base.files import written_whole
from teacache.comparison.tables import markdown_table
from teacache.results.record import versions, write_json

HEADINGS = ["figure", "measured", "lowest to highest", "allocated (GiB)", "reserved (GiB)", "notes"]


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
        """The row's line in the table."""
        median = statistics.median(self.seconds) if self.seconds else 0.0
        unit, of = ("ms", 1e-3) if median < 0.1 else ("s", 1.0)
        spread = f"{min(self.seconds) / of:.3g} to {max(self.seconds) / of:.3g}" if median else ""
        memory = [f"{n / 2**30:.2f}" if n else "" for n in (self.allocated, self.reserved)]
        shown = f"{median / of:.3g} {unit}" if median else ""
        return [self.figure, shown, spread if len(self.seconds) > 1 else "", *memory, self.notes]


class Table:
    """The rows so far, and the files that hold them.

    Args:
        stem: path of the `.md` and the `.json` without these endings. Both are written again with
            each row, so that a benchmark that is killed leaves what it has measured. None for a
            rank that does not report.
        about: the machine and what is measured on, of the head of the table.
    """

    def __init__(self, stem: Path | None, about: dict[str, str]):
        self.stem, self.about = stem, about
        self.rows: list[Row] = []
        self.texts: list[str] = []  # below the table

    def describe(self, device: str) -> None:
        """Add the machine and the date to the head."""
        self.about["device"] = device
        self.about["date"] = datetime.date.today().isoformat()
        self.about["versions"] = ", ".join(f"{name} {n}" for name, n in versions().items())

    def measure(self, figure: str, work: Callable[[], Row], alone: bool = True) -> bool:
        """Add the row that `work` returns, or one with its error. Returns whether it succeeded.

        Args:
            alone: whether this is the only rank. Others would wait for one that failed, so then an
                error ends the benchmark.
        """
        try:
            row = work()
        except Exception as error:
            interruption.check()  # some libraries turn an interruption into an error of their own
            if not alone:
                raise
            one_line = error if isinstance(error, TeaCacheError) else reason(error)
            row = Row(notes=f"failed: {one_line}", failed=True)
        row.figure = figure
        self.add(row)
        return not row.failed

    def add(self, row: Row) -> None:
        """Add a row; print it on standard error; write the files."""
        self.rows.append(row)
        if self.stem is not None:
            print("  ".join(filter(None, row.cells())), file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """Write the files."""
        if self.stem is None:
            return
        rows = [asdict(row) for row in self.rows]
        with written_whole(self.stem, ".md", ".json") as (table, figures):
            table.write_text(self.markdown() + "\n", encoding="utf-8")
            write_json({"about": self.about, "rows": rows, "texts": self.texts}, figures)

    def take(self, data: dict[str, Any]) -> None:
        """Take over what another process has written as `.json`."""
        self.about = {**data["about"], **self.about}
        self.rows += [Row(**row) for row in data["rows"]]
        self.texts += data["texts"]
        self.write()

    def markdown(self) -> str:
        """The whole report."""
        head = "\n".join(f"- {name}: {value}" for name, value in self.about.items())
        lines = [[cell.replace("\n", " ") for cell in row.cells()] for row in self.rows]
        table = markdown_table([HEADINGS, *lines])
        return "\n\n".join(["# Benchmark", head, table, *self.texts])


def in_words(seconds: dict[str, float]) -> str:
    """The seconds of stages in one line."""
    return ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
