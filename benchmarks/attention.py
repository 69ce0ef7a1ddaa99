"""Attention with max logits next to the same without, and next to `jax.nn.dot_product_attention`.

    python -m benchmarks.attention --json PATH

Output and gradients of queries, keys and values, at one number of heads. All implementations of a
case take turns in one process.

In a row, `ratio_vs_without_max_logits` is its seconds over those of the same attention when only
the output is asked for, `ratio_vs_jax_nn` over those of `jax.nn.dot_product_attention` as it comes;
below 1 is faster. `temp_bytes` is what the program sets aside beyond arguments and results.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tyro
from rich import box
from rich.table import Table

import muonclip_jax as mc
from benchmarks import pictures, targets, timing
from benchmarks.targets import Target
from muonclip_jax._attention.measure import measure_max_logits

AUTO, JAX_NN = "auto", "jax.nn"
LOGSUMEXP, MEASURED = "logsumexp", "jax.nn + measure_max_logits"
ASKED_LENGTH = 2048  # for which the project says what the maxima may cost

Attention = Callable[..., Any]
"""`(query, key, value, is_causal=...)` → whatever it gives; the output is it or comes first."""


@dataclass(frozen=True)
class Options:
    """What attention costs with max logits, forward and backward."""

    lengths: tuple[int, ...] = (128, 512, 2048)
    """Of queries and keys."""
    batch_sizes: tuple[int, ...] = (1, 4)
    heads: int = 8
    head_size: int = 64
    dtypes: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("float32", "bfloat16")
    causal: tuple[bool, ...] = (True, False)
    memory_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """For which programs are compiled, to see what memory they set aside."""
    chunk_sizes: tuple[int, ...] = ()
    """Of the chunked form, to be compared with the one it chooses."""
    repeats: int = 51
    """Calls of each that are timed, at most. The maxima cost less than the noise of a few."""
    seconds_per_comparison: float = 20.0
    """After so many no new turn of calls begins."""
    json: Path | None = None
    """Write the figures there as well."""
    picture: Path | None = None
    """Draw them there."""


class Case(NamedTuple):
    batch_size: int
    length: int
    dtype: str
    causal: bool


class Entry(NamedTuple):
    """An attention with max logits, and the same without."""

    attend: Attention
    without: Attention


def entries(options: Options) -> dict[str, Entry]:
    ours = mc.dot_product_attention
    theirs = jax.nn.dot_product_attention
    chunked = {
        f"chunked, {size}": functools.partial(ours, implementation="chunked", chunk_size=size)
        for size in options.chunk_sizes
    }
    return {
        **{label: Entry(f, _output_of(f)) for label, f in ({AUTO: ours} | chunked).items()},
        LOGSUMEXP: Entry(functools.partial(ours, implementation="logsumexp"), theirs),
        MEASURED: Entry(_measured, theirs),
        JAX_NN: Entry(theirs, theirs),
    }


def _output_of(attend: Attention) -> Attention:
    return lambda *operands, **options: attend(*operands, **options)[0]


def _measured(query, key, value, *, is_causal):
    out = jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)
    return out, measure_max_logits(query, key, is_causal=is_causal)


def compile_both_passes(attend: Attention, case: Case, operands: Sequence[jax.Array]) -> Any:
    """Of `(query, key, value, d_out)`: all that `attend` gives, and the gradients."""

    def both(query, key, value, d_out):
        def output(*qkv):
            given = attend(*qkv, is_causal=case.causal)
            return given if isinstance(given, tuple) else (given, None)

        out, pull, max_logits = jax.vjp(output, query, key, value, has_aux=True)
        return out, max_logits, pull(d_out)

    return jax.jit(both).lower(*operands).compile()


def compare(case: Case, entries: Mapping[str, Entry], options: Options) -> list[dict[str, Any]]:
    """A row for each entry."""
    shape = (case.batch_size, case.length, options.heads, options.head_size)
    operands = [
        jax.random.normal(key, shape).astype(case.dtype)
        for key in jax.random.split(jax.random.key(0), 4)
    ]
    compiled, seconds = {}, {}

    def run(attend: Attention) -> Callable[[], Any]:
        if attend not in compiled:
            compiled[attend] = compile_both_passes(attend, case, operands)
        return functools.partial(compiled[attend], *operands)

    def take_turns(*attends: Attention) -> dict[Attention, float]:
        functions = {attend: run(attend) for attend in attends}
        limits = options.repeats, options.seconds_per_comparison
        return timing.medians(timing.interleaved(functions, *limits))

    def ratio_vs_without(entry: Entry) -> float:
        # By themselves, if nobody else's row has the one without: after jax.nn, which allocates
        # much more, whoever is next waits for memory.
        alone = entry.without not in seconds
        of_both = take_turns(*entry) if alone else seconds
        return of_both[entry.attend] / of_both[entry.without]

    seconds |= take_turns(*(entry.attend for entry in entries.values()))
    return [
        {
            "shape": shape,
            "dtype": case.dtype,
            "causal": case.causal,
            "implementation": label,
            "seconds_median": seconds[entry.attend],
            "ratio_vs_without_max_logits": ratio_vs_without(entry),
            "ratio_vs_jax_nn": seconds[entry.attend] / seconds[entries[JAX_NN].attend],
            "temp_bytes": compiled[entry.attend].memory_analysis().temp_size_in_bytes,
        }
        for label, entry in entries.items()
    ]


def temporaries(options: Options, entries: Mapping[str, Entry]) -> list[dict[str, Any]]:
    """How memory grows with the length, of causal attention on one sequence: compiled, not run."""
    rows = []
    for length, dtype in itertools.product(options.memory_lengths, options.dtypes):
        shape = (1, length, options.heads, options.head_size)
        case = Case(1, length, dtype, causal=True)
        for label in (AUTO, JAX_NN):
            operands = [jax.ShapeDtypeStruct(shape, dtype)] * 4
            compiled = compile_both_passes(entries[label].attend, case, operands)
            temp_bytes = compiled.memory_analysis().temp_size_in_bytes
            rows.append(
                {"shape": shape, "dtype": dtype, "implementation": label, "temp_bytes": temp_bytes}
            )
    return rows


def asked(rows: Sequence[Mapping[str, Any]], memory: Sequence[Mapping[str, Any]]) -> list[Target]:
    """Of `auto`, on CPU."""
    found: list[Target] = []
    for row in _of_auto(rows):
        what = f"{_case(row)}, {row['dtype']}"
        found.append(Target(f"{what}: ratio_vs_jax_nn", row["ratio_vs_jax_nn"], "<=", 1.0))
        if _length(row) == ASKED_LENGTH:
            ratio = row["ratio_vs_without_max_logits"]
            found.append(Target(f"{what}: ratio_vs_without_max_logits", ratio, "<=", 1.03))
    for dtype, of_dtype in itertools.groupby(
        sorted(_of_auto(memory), key=lambda row: (row["dtype"], _length(row))),
        key=lambda row: row["dtype"],
    ):
        for short, long in itertools.pairwise(of_dtype):
            what = f"{dtype}: temp_bytes of length {_length(long)} over {_length(short)}'s"
            growth = long["temp_bytes"] / short["temp_bytes"]
            found.append(Target(what, growth, "<=", 1.1 * _length(long) / _length(short)))
    return found


def _of_auto(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    on_cpu = jax.default_backend() == "cpu"
    return [row for row in rows if on_cpu and row["implementation"] == AUTO]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(
        title=f"Attention, forward and backward, on {timing.device()}",
        caption="× are the seconds of the row over those of the other: below 1 is faster.",
        box=box.SIMPLE_HEAD,
    )
    for header in ("batch × length", "dtype", "implementation"):
        table.add_column(header)
    for header in ("ms", "× without\nmax logits", "× jax.nn", "MB\ntemporary"):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            _case(row),
            row["dtype"],
            row["implementation"],
            f"{row['seconds_median'] * 1e3:.1f}",
            f"{row['ratio_vs_without_max_logits']:.3f}",
            f"{row['ratio_vs_jax_nn']:.2f}",
            f"{row['temp_bytes'] / 1e6:.1f}",
        )
    timing.console().print(table)


def draw(rows: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    """A panel a dtype."""
    panels: dict[str, tuple[dict, dict]] = {}
    for row in rows:
        ours, peers = panels.setdefault(row["dtype"], ({}, {}))
        if row["implementation"] != JAX_NN:
            group = peers if row["implementation"] in (LOGSUMEXP, MEASURED) else ours
            figures = group.setdefault(row["implementation"], {})
            figures[_case(row)] = row["ratio_vs_jax_nn"]
    pictures.lanes(
        panels,
        path,
        title=f"Attention with max logits, forward and backward, on {timing.device()}",
        label="seconds over those of jax.nn",
        reference="jax.nn.dot_product_attention, which tells no maxima",
    )


def _length(row: Mapping[str, Any]) -> int:
    return row["shape"][1]


def _case(row: Mapping[str, Any]) -> str:
    batch_size, length, *_ = row["shape"]
    return f"{batch_size}×{length}{', causal' if row['causal'] else ''}"


def main(options: Options) -> dict[str, Any]:
    found = entries(options)
    cases = itertools.product(options.batch_sizes, options.lengths, options.dtypes, options.causal)
    rows = [row for case in itertools.starmap(Case, cases) for row in compare(case, found, options)]
    memory = temporaries(options, found)
    reached = asked(rows, memory)
    show(rows)
    targets.show(reached)
    record = timing.record(options, rows, memory=memory, targets=targets.as_rows(reached))
    timing.write(record, options.json)
    draw(rows, options.picture)
    return record


if __name__ == "__main__":
    main(tyro.cli(Options))
