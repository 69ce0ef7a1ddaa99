"""Tables of the documentation, read by the tests that recompute them."""

import pathlib
import re

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def tables(page: str) -> list[list[dict[str, str]]]:
    """Every table of a page: its rows, each by the words of the table's head."""
    found, head = [], None
    for line in (DOCS / page).read_text().splitlines():
        if not line.startswith("|"):
            head = None
        elif head is None:
            head = cells(line)
            found.append([])
        elif set(line) - set("|-: "):
            row = cells(line)
            assert len(row) == len(head), f"{page}: {line}"
            found[-1].append(dict(zip(head, row, strict=True)))
    return found


def table(page: str, *columns: str) -> list[dict[str, str]]:
    """The only table of a page that has these columns."""
    (rows,) = (rows for rows in tables(page) if rows and set(columns) <= rows[0].keys())
    return rows
