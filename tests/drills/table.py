"""docs/drills.md: what was done, what was seen of it, and how long that took. Pure functions over the reports."""

import re
from collections.abc import Sequence

from tests.drills.drill import Refused
from tests.drills.runner import Report, Row
from tests.drills.site import SETTINGS

FIRST_WORDS = 170
"""Characters of a message in the table."""
VARIABLE = (
    (re.compile(r"\b\d\d:\d\d:\d\d UTC"), "*time*"),
    (re.compile(r"-[0-9a-f]{8}(?=[/\s.:\"]|$)"), "-*uid*"),
    (re.compile(r"(kubetune-stage)-[0-9a-f]{10}"), r"\1-*hash*"),
    (re.compile(r"(-a\d+-\d+)-[a-z0-9]{5}\b"), r"\1-*pod*"),
    (re.compile(r"\b127\.0\.0\.1:\d+/"), "*registry*/"),
    (re.compile(r"\s+"), " "),
)
"""What is another in each run or cluster, and the line breaks that a table cannot have."""

HEAD = """\
# Drills

What happens when something goes wrong, or when somebody interferes, as it was seen on a real node: `make drills` does
all of this on the cluster, with the chart installed, and writes this page.

The seconds count from the last thing that was done (or from the start of what was away) until the FineTuneJob said so.
They are those of a node with two cores on which other drills ran at the same time, and of an operator with these
settings: {settings}.

The message is that of the condition which the state comes with; only its first words stand here. A drill that did not
end as it must when it last ran has a row that says so.
"""
UNSEEN = "**not seen in the last run**"
ROW_HEAD = "| case | what was done | state, reason | the message begins | seconds |\n| --- | --- | --- | --- | ---: |\n"


def page(reports: Sequence[Report]) -> str:
    """The whole page, topic by topic, in the order of the drills."""
    settings = ", ".join(f"`{name}: {value}`" for name, value in SETTINGS.items())
    topics = dict.fromkeys(report.drill.topic for report in reports)
    parts = [HEAD.format(settings=settings)]
    for topic in topics:
        rows = "".join(_rows(report) for report in reports if report.drill.topic == topic)
        parts.append(f"\n## {topic}\n\n{ROW_HEAD}{rows}")
    return "".join(parts)


def _rows(report: Report) -> str:
    """The acts of a drill; only the first one tells the case."""
    cases = [report.drill.case, *[""] * len(report.drill.acts)]
    if not report.rows:
        done = zip(cases, report.drill.acts, strict=False)
        return "".join(f"| {escaped(case)} | {escaped(act.done)} | {UNSEEN} |  |  |\n" for case, act in done)
    return "".join(map(line, zip(cases, report.rows, strict=False)))


def line(told: tuple[str, Row]) -> str:
    """One line of the table."""
    case, row = told
    seen = ", ".join(word for word in (row.state, row.reason) if word) or "refused"
    words = first_words(_told_by_server(row.message) if isinstance(row.act.seen, Refused) else row.message)
    return f"| {escaped(case)} | {escaped(row.act.done)} | {seen} | {escaped(words)} | {row.seconds:.1f} |\n"


def first_words(message: str) -> str:
    """The start of a message, without what differs from run to run."""
    text = message.strip()
    for pattern, name in VARIABLE:
        text = pattern.sub(name, text)
    if len(text) <= FIRST_WORDS:
        return text
    return f"{text[:FIRST_WORDS].rpartition(' ')[0]} ..."


def _told_by_server(refusal: str) -> str:
    """kubectl's words without our tool's command line before them."""
    return re.sub(r"(?s)^`.*?` ended with \d+:\s*", "", refusal)


def escaped(text: str) -> str:
    """The text in a cell."""
    return text.replace("|", "\\|").replace("<", "&lt;")
