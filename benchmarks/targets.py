"""What a benchmark's figures are to reach, next to what they reach."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from rich import box
from rich.table import Table

from benchmarks import timing


class Target(NamedTuple):
    """One figure and its bound.

    Attributes:
      what: The figure, in words.
      measured: Its value.
      relation: How it is to lie to what is asked.
      asked: The bound.
    """

    what: str
    measured: float
    relation: Literal[">=", "<="]
    asked: float

    @property
    def holds(self) -> bool:
        if self.relation == ">=":
            return self.measured >= self.asked
        return self.measured <= self.asked


def as_rows(targets: Iterable[Target]) -> list[dict[str, Any]]:
    """For a record."""
    return [{**target._asdict(), "holds": target.holds} for target in targets]


def show(targets: Sequence[Target]) -> None:
    """A table of them, if there are any."""
    if not targets:
        return
    table = Table(title="Asked and measured", box=box.SIMPLE_HEAD)
    table.add_column("")
    for header in ("asked", "measured"):
        table.add_column(header, justify="right")
    table.add_column("holds")
    for target in targets:
        sign = "≥" if target.relation == ">=" else "≤"
        holds = "yes" if target.holds else "[bold red]no[/]"
        table.add_row(target.what, f"{sign} {target.asked:.4g}", f"{target.measured:.4g}", holds)
    timing.console().print(table)
