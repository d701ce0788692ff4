"""Tables of what was measured, in CSV files: rows take the place of older ones of the same."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from zoo.files import whole_file

Row = dict[str, str | int]


def read_table(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a file, none where there is no file.

    Raises:
        ValueError: if it has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != tuple(columns):
            raise ValueError(f"{path} has other columns than are written to it: remove it, or name another file")
        return list(reader)


def update_table(path: Path, columns: Sequence[str], key: Sequence[str], rows: Iterable[Row]) -> None:
    """Write rows to a file, by their first column and then in the order of measurement, under a header.

    Args:
        path: the file; it is made, with its folder, where there is none.
        columns: all of its columns. What a row lacks stays empty.
        key: columns; rows of the file that agree in them with a new one go.
        rows: new ones.

    Raises:
        ValueError: if the file has other columns.
    """
    rows = list(rows)
    replaced = {_values(row, key) for row in rows}
    kept = [row for row in read_table(path, columns) if _values(row, key) not in replaced]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*kept, *rows], key=lambda row: row[columns[0]]))


def _values(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in columns)
