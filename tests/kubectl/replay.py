"""A kubectl that answers from a scenario: see Replay in conftest.py."""

import json
import signal
import sys
from pathlib import Path


def main(folder: Path, argv: list[str]) -> int:
    """Answer one command line."""
    log = folder / "asked.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    used = [json.loads(line)["answer"] for line in lines]
    for number, answer in enumerate(json.loads((folder / "scenario.json").read_text())):
        if all(word in argv for word in answer["words"]) and used.count(number) < answer["times"]:
            note(log, argv, number)
            sys.stderr.write(answer["err"])
            sys.stdout.write(answer["out"])
            sys.stdout.flush()
            if answer["hangs"]:
                signal.pause()
            return int(answer["code"])
    note(log, argv, -1)
    sys.stderr.write(f"the scenario has no answer to {argv}\n")
    return 1


def note(log: Path, argv: list[str], number: int) -> None:
    """Write down what was asked."""
    with log.open("a") as file:
        file.write(json.dumps({"argv": argv, "answer": number}) + "\n")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
