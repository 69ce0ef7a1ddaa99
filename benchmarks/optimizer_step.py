"""A whole optimizer step, `mc.muon` next to `optax.contrib.muon` and `torch.optim.Muon`.

    python -m benchmarks.optimizer_step --json PATH

Parameters are those of a decoder like GPT-2 small, one array a kernel, without the model. All have
the same momentum, learning rate, decay and update size, and give embeddings and norms to AdamW;
each runs the five polynomials that it comes with. A JAX step is `update` and `apply_updates`,
compiled as one, parameters and state donated. Steps take turns; so do compilations, which start
with JAX's caches empty and include tracing and lowering. A ratio is a peer's seconds over a row's.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from rich import box
from rich.table import Table

import muonclip_jax as mc
from benchmarks import peers, pictures, targets, timing
from benchmarks.targets import Target

LEARNING_RATE, WEIGHT_DECAY, UPDATE_RMS = 3e-4, 0.1, 0.2
OURS, OPTAX = "ours", "optax"
Label = Literal["ours", "ours-float32", "optax", "optax-bfloat16", "torch", "torch.compile"]
RATIOS = {
    "ratio_vs_optax": OPTAX,
    "ratio_vs_optax_bf16": "optax-bfloat16",
    "ratio_vs_torch": "torch",
    "ratio_vs_torch_compiled": "torch.compile",
}


@dataclass(frozen=True)
class Options:
    """What an optimizer step costs to run, and to compile."""

    layers: int = 12
    """Of the decoder whose steps are timed."""
    compile_layers: tuple[int, ...] = (48,)
    """Of further decoders, whose steps are compiled only."""
    width: int = 768
    vocab_size: int = 50304
    run: tuple[Label, ...] = ("ours", "ours-float32", "optax", "optax-bfloat16", "torch")
    """The steps that are timed. (torch.compile takes minutes to compile one.)"""
    repeats: int = 7
    """Steps of each that are timed."""
    compile_repeats: int = 3
    """Compilations of each that are timed."""
    json: Path | None = None
    """Write the figures there as well."""
    picture: Path | None = None
    """Draw them there."""


class Entry(NamedTuple):
    """An optimizer of JAX's.

    Attributes:
      method: What the row is called.
      dtype: Of the Newton–Schulz iteration.
      schedule: Its polynomials.
      tx: The optimizer.
      gradient: The dtype of the gradients that it is given.
    """

    method: str
    dtype: str
    schedule: str
    tx: optax.GradientTransformation
    gradient: str = "float32"


def entries() -> dict[Label, Entry]:
    """Those of JAX."""
    schedule = mc.schedules.polar_express()

    def ours(dtype: str = "auto") -> Entry:
        how = mc.NewtonSchulz(schedule, dtype)
        tx = mc.muon(LEARNING_RATE, newton_schulz=how, weight_decay=WEIGHT_DECAY)
        return Entry("ours", str(how.on(jax.default_backend()).dtype), schedule.name, tx)

    theirs = functools.partial(optax.contrib.muon, **muon_settings())
    return {
        OURS: ours(),
        "ours-float32": ours("float32"),
        OPTAX: Entry("optax", "float32", "jordan", theirs()),
        # Its iteration has the dtype of its momentum, which is the wider of these two.
        "optax-bfloat16": Entry(
            "optax", "bfloat16", "jordan", theirs(mu_dtype="bfloat16"), "bfloat16"
        ),
    }


def muon_settings(numbers: Any = optax.contrib.MuonDimensionNumbers()) -> dict[str, Any]:  # noqa: B008
    """Arguments of `optax.contrib.muon`, and of what is made after it with `numbers` of its own."""

    def kernels(params: Any) -> Any:  # by default Optax would take the embedding as well
        return jax.tree_util.tree_map_with_path(
            lambda path, _: numbers if _is_kernel(path) else None, params
        )

    return {
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "adam_weight_decay": WEIGHT_DECAY,
        "adam_b2": 0.95,
        "consistent_rms": UPDATE_RMS,
        "muon_weight_dimension_numbers": kernels,
    }


def _is_kernel(path: Any) -> bool:
    return path[-1].key == "kernel"


def decoder(layers: int, width: int, vocab_size: int) -> Any:
    """Shapes of a GPT-like decoder's parameters, float32, kernels `[in, out]`."""

    def leaf(name: str, *shape: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32)}

    def layer() -> dict[str, Any]:
        return {
            "attn_norm": leaf("scale", width),
            "attn": {name: leaf("kernel", width, width) for name in ("q", "k", "v", "o")},
            "mlp_norm": leaf("scale", width),
            "mlp": {
                "up": leaf("kernel", width, 4 * width),
                "down": leaf("kernel", 4 * width, width),
            },
        }

    return {
        "embed": leaf("embedding", vocab_size, width),
        "layers": {str(i): layer() for i in range(layers)},
        "norm": leaf("scale", width),
    }


def lower_step(entry: Entry, shapes: Any, **jit: Any) -> jax.stages.Lowered:
    """Traces and lowers a step, with these arguments of `jax.jit`."""

    def step(params, state, gradient):
        updates, state = entry.tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    gradient = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, entry.gradient), shapes)
    state = jax.eval_shape(entry.tx.init, shapes)
    return jax.jit(step, donate_argnums=(0, 1), **jit).lower(shapes, state, gradient)


class Training:
    """A compiled step with its parameters and state."""

    def __init__(self, entry: Entry, compiled: jax.stages.Compiled, params: Any):
        self.compiled = compiled
        self.params = jax.tree.map(jnp.copy, params)
        self.state = entry.tx.init(params)
        self.gradient = jax.tree.map(lambda x: x.astype(entry.gradient), params)

    def __call__(self) -> Any:
        self.params, self.state = self.compiled(self.params, self.state, self.gradient)
        return self.params


def run(
    compiled: Mapping[str, jax.stages.Compiled],
    entries: Mapping[str, Entry],
    shapes: Any,
    options: Options,
) -> dict[str, float]:
    """Label → median seconds of a step, PyTorch's included."""
    params = _random(shapes)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    torchs = peers.torch_steps(
        options.run,
        [leaf for path, leaf in leaves if _is_kernel(path)],
        [leaf for path, leaf in leaves if not _is_kernel(path)],
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
    )
    functions = {
        **{label: Training(entries[label], compiled[label], params) for label in compiled},
        **torchs,
    }
    return timing.medians(timing.interleaved(functions, options.repeats))


def _random(shapes: Any) -> Any:
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten(
        0.02 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    )


def measure(layers: int, options: Options) -> list[dict[str, Any]]:
    """A row for each optimizer; where steps are not timed, for ours and Optax's."""
    timed = layers == options.layers
    wanted = options.run if timed else (OURS, OPTAX)
    found = {label: entry for label, entry in entries().items() if label in wanted}
    shapes = decoder(layers, options.width, options.vocab_size)
    compiled, compile_seconds = timing.compilations(
        {label: lambda e=e: lower_step(e, shapes).compile() for label, e in found.items()},
        options.compile_repeats,
    )
    temps = {label: each.memory_analysis().temp_size_in_bytes for label, each in compiled.items()}
    seconds = run(compiled, found, shapes, options) if timed else {}
    return [
        {
            "layers": layers,
            **_what(label, found),
            "seconds_median": seconds.get(label),
            **{name: _ratio(seconds, peer, label) for name, peer in RATIOS.items()},
            "compile_seconds": compile_seconds.get(label),
            "compile_share_of_optax": _ratio(compile_seconds, label, OPTAX),
            "temp_bytes": temps.get(label),
            "temp_share_of_optax": _ratio(temps, label, OPTAX),
        }
        for label in dict.fromkeys((*compiled, *seconds))
    ]


def _what(label: str, entries: Mapping[str, Entry]) -> dict[str, str]:
    if entry := entries.get(label):
        return {"method": entry.method, "dtype": entry.dtype, "schedule": entry.schedule}
    return {"method": label, "dtype": "bfloat16", "schedule": "jordan"}  # PyTorch's


def _ratio(figures: Mapping[str, float], above: str, below: str) -> float | None:
    if above not in figures or below not in figures:
        return None
    return figures[above] / figures[below]


# Decoder's layers → figure → what it is to be for ours as it comes, on two CPU cores.
ASKED: dict[int, dict[str, tuple[Literal[">=", "<="], float]]] = {
    12: {
        "ratio_vs_optax": (">=", 4.0),
        "ratio_vs_torch": (">=", 1.0),
        "compile_share_of_optax": ("<=", 1 / 3),
        "temp_share_of_optax": ("<=", 1.0),
    },
    48: {"compile_share_of_optax": ("<=", 1 / 5)},
}


def asked(rows: Sequence[Mapping[str, Any]], options: Options) -> list[Target]:
    """What there are targets for, which are those of GPT-2 small's width on a CPU with AMX."""
    if options.width != 768 or timing.kind() != "cpu with AMX":
        return []
    return [
        Target(f"{row['layers']} layers: {name}", row[name], *bound)
        for row in rows
        if (row["method"], row["dtype"]) == ("ours", "bfloat16")
        for name, bound in ASKED.get(row["layers"], {}).items()
        if row[name] is not None
    ]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(
        title=f"An optimizer step on {timing.device()}",
        caption="× are the seconds of a peer over those of the row.",
        box=box.SIMPLE_HEAD,
    )
    for header in ("layers", "method", "dtype"):
        table.add_column(header, justify="right" if header == "layers" else "left")
    ratios = ("×\noptax", "× optax\nbfloat16", "×\ntorch", "× torch\ncompiled")
    for header in ("ms", *ratios, "compile\nseconds", "of\noptax's", "MB\ntemporary"):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            str(row["layers"]),
            row["method"],
            row["dtype"],
            _cell(row["seconds_median"], 1e3, 0),
            *(_cell(row[ratio]) for ratio in RATIOS),
            _cell(row["compile_seconds"]),
            _cell(row["compile_share_of_optax"]),
            _cell(row["temp_bytes"], 1e-6, 0),
        )
    timing.console().print(table)


def _cell(figure: float | None, factor: float = 1.0, digits: int = 2) -> str:
    return "" if figure is None else f"{figure * factor:.{digits}f}"


def draw(rows: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    """How many times as fast, to run and to compile, and how much smaller, than Optax as it is."""
    ours: dict[str, dict[str, float]] = {}
    theirs: dict[str, dict[str, float]] = {}
    for row in rows:
        name = f"{row['method']}, {row['dtype']}"
        figures = {
            "run": row["ratio_vs_optax"],
            "compile": row["compile_share_of_optax"] and 1 / row["compile_share_of_optax"],
        }
        group = ours if row["method"] == "ours" else theirs
        for what, figure in figures.items():
            if figure is not None:
                group.setdefault(name, {})[f"{what}, {row['layers']} layers"] = figure
    pictures.lanes(
        {"": (ours, theirs)},
        path,
        title=f"An optimizer step on {timing.device()}",
        label="times as fast as optax.contrib.muon",
        reference="optax.contrib.muon as it comes, in the same run",
    )


def main(options: Options) -> dict[str, Any]:
    layers = dict.fromkeys((options.layers, *options.compile_layers))
    rows = [row for each in layers for row in measure(each, options)]
    reached, missing = asked(rows, options), peers.missing(options.run)
    show(rows)
    targets.show(reached)
    for why in missing:
        timing.console().print(why)
    record = timing.record(options, rows, targets=targets.as_rows(reached), missing=missing)
    timing.write(record, options.json)
    draw(rows, options.picture)
    return record


if __name__ == "__main__":
    main(tyro.cli(Options))
