"""What was seen of each drill when it last ran, kept from run to run: a drill that is repeated changes its own rows."""

import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.drills.drill import Drill
from tests.drills.runner import Report, Row


class Ledger:
    """A file with the rows of the drills that were as they must be."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._one = threading.Lock()
        self.seen: dict[str, list[dict[str, Any]]] = json.loads(file.read_text()) if file.is_file() else {}

    def take(self, report: Report) -> None:
        """Note what was seen; a drill that failed has no rows any more."""
        with self._one:
            self.seen.pop(report.drill.name, None)
            if not report.problem:
                self.seen[report.drill.name] = [_plain(row) for row in report.rows]
            self.file.write_text(json.dumps(self.seen, indent=1))

    def reports(self, drills: Iterable[Drill]) -> list[Report]:
        """What is known of these drills; nothing of one that has changed since it ran."""
        return [Report(drill, self._rows(drill)) for drill in drills]

    def _rows(self, drill: Drill) -> list[Row]:
        rows = self.seen.get(drill.name, [])
        if [row["done"] for row in rows] != [act.done for act in drill.acts]:
            return []
        return [_row(drill, number, row) for number, row in enumerate(rows)]


def _plain(row: Row) -> dict[str, Any]:
    return {
        "done": row.act.done,
        "state": row.state,
        "reason": row.reason,
        "message": row.message,
        "seconds": row.seconds,
    }


def _row(drill: Drill, number: int, row: dict[str, Any]) -> Row:
    return Row(drill, drill.acts[number], row["state"], row["reason"], row["message"], row["seconds"])
