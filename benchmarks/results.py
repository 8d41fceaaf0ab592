"""Results files: JSON lines, each with the machine, its ceilings and the date; runs append."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "results"


class Results:
    """A results file that is being written, one line as soon as a row is measured."""

    def __init__(self, path, stamp):
        self.path, self.stamp = Path(path), stamp
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, fields):
        """Append one row with the stamp, and return it as it will be read."""
        row = rounded(fields | self.stamp)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


def read(path):
    """Return the rows of a results file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def rounded(value):
    """Return a value with floats to five digits: more would pretend to be known."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
