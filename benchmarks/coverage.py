"""How many known models one line suffices for: `mc.muon(1e-3)` and `mc.find_layout(params)`.

    make test-models                                # makes .venv-models, with the models
    .venv-models/bin/python -m benchmarks.coverage

Each configuration that MaxText and Tunix ship, each Flax model of Transformers and each model class
of gemma is made abstractly: without memory and without a compiler. What is read of its parameters
without a rule and without a layout is compared with `benchmarks.known_models`, written from the
models' sources. The same trees go through `optax.contrib.muon`. With `--trees FOLDER` the shapes
are kept there, and those that are there are not made again. (`tests/parameters/test_reading.py` has
the models that are transcribed.)
"""

import importlib
import importlib.machinery
import inspect
import json
import platform
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import rich
import tyro
from flax import linen, nnx, traverse_util
from rich.table import Table

import muonclip_jax as mc
from benchmarks import known_models
from muonclip_jax._core import paths

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Options:
    """Which models are read right without a rule and without a layout."""

    libraries: tuple[str, ...] = ("maxtext", "transformers", "tunix", "gemma")
    only: str | None = None
    """A word that a model's name must have."""
    trees: Path | None = None
    json: Path | None = None


@dataclass
class Judgement:
    """What one model's parameters gave.

    Attributes:
      architecture: The code that makes it: MaxText's decoder block, a package's module.
      error: Why it could not be made or judged, or what `describe` raised.
      unmade: Whether it could not be made, or `known_models` says nothing of it.
      wrong: Parameters that are read, and not as the source has them.
      layout: "found", "asks" for the number of heads, or what `find_layout` raised.
      clips: Attention blocks that the layout has, and whether a QK-norm makes clips refuse them.
      optax: How many attention kernels, embeddings and unembeddings Optax's Muon misroutes.
    """

    library: str
    name: str
    architecture: str
    error: str = ""
    unmade: bool = False
    wrong: list[str] = field(default_factory=list)
    layout: str = ""
    clips: dict[str, int] = field(default_factory=dict)
    optax: dict[str, int] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        return not (self.error or self.wrong)


Made = tuple[str, str, Callable[[], Any]]  # name, architecture, how its parameters are made


def maxtext() -> Iterator[Made]:
    """Every configuration in `maxtext/configs/models`."""
    import maxtext
    import yaml
    from maxtext.configs import pyconfig
    from maxtext.models import models
    from maxtext.utils import maxtext_utils

    configs = Path(next(iter(maxtext.__path__))) / "configs"

    def make(name: str, **options: Any) -> Any:
        options |= dict(model_name=name, run_name="coverage", hardware="cpu", log_config=False)
        options |= dict(attention="dot_product", enable_checkpointing=False)
        options |= dict(skip_jax_distributed_system=True, per_device_batch_size=1)
        config = pyconfig.initialize_pydantic(["", str(configs / "base.yml")], **options)
        devices = maxtext_utils.create_device_mesh(config, devices=jax.devices()[:1])
        mesh = jax.sharding.Mesh(devices, config.mesh_axes)
        with mesh, linen.logical_axis_rules(config.logical_axis_rules):
            rngs = lambda: nnx.Rngs(params=0, dropout=1)  # noqa: E731
            return nnx.eval_shape(lambda: models.Transformer(config, mesh, None, rngs=rngs()))

    for file in sorted((configs / "models").glob("*.yml")):
        block = yaml.safe_load(file.read_text())["decoder_block"]
        # Keys of other layers: MaxText itself refuses to scan these.
        options = dict(scan_layers=False) if block == "gemma4_small" else {}
        yield file.stem, block, lambda name=file.stem, options=options: make(name, **options)


def transformers() -> Iterator[Made]:
    """The Flax model of every architecture that has one, of its configuration's defaults but with
    two layers of each kind."""
    import transformers
    from transformers.models.auto import modeling_flax_auto as auto

    models: dict[str, str] = {}
    for task in ("FOR_PRETRAINING", "FOR_CAUSAL_LM", "FOR_MASKED_LM", "FOR_IMAGE_CLASSIFICATION"):
        models = {**getattr(auto, f"FLAX_MODEL_{task}_MAPPING_NAMES"), **models}
    models = {**auto.FLAX_MODEL_MAPPING_NAMES, **models}
    depths = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")

    def make(model: Any) -> Any:
        config = model.config_class()
        for depth in depths:
            if isinstance(getattr(config, depth, None), int) and config.model_type != "gpt_neo":
                setattr(config, depth, 2)
        own = model(config, _do_init=False)
        return jax.eval_shape(lambda key: own.init_weights(key, own.input_shape), jax.random.key(0))

    for name, model in sorted(models.items()):
        yield name, name, lambda model=model: make(getattr(transformers, model))


def tunix() -> Iterator[Made]:
    """Every configuration that a classmethod of a `ModelConfig` gives: one of several that are the
    same, as those of a base and an instruct model, and with its vision encoder where it has one."""
    bare_package("tunix")

    def make(model: Any, config: Any) -> Any:
        return nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))

    for architecture in ("gemma", "gemma3", "gemma4", "llama3", "qwen2", "qwen3"):
        module = importlib.import_module(f"tunix.models.{architecture}.model")
        model, known = getattr(module, architecture.capitalize()), []
        for name, config in tunix_configs(module.ModelConfig):
            if config not in known:
                known.append(config)
                yield name, architecture, partial(make, model, config)


def tunix_configs(kind: Any) -> Iterator[tuple[str, Any]]:
    """What the public classmethods give, by their names."""
    for name, method in vars(kind).items():
        if isinstance(method, classmethod) and not name.startswith("_"):
            configure = getattr(kind, name)
            yield name, configure()
            if "text_only" in inspect.signature(configure).parameters:
                yield f"{name} with vision", configure(text_only=False)


def gemma() -> Iterator[Made]:
    """Every model class in `gemma.gm.nn` as it is by default: Gemma 3 and 3n with the encoder of
    images, Gemma 4 without."""
    bare_package("gemma.gm.ckpts")
    tensorflow = types.ModuleType("tensorflow")  # of which a module below gemma names a type
    tensorflow.__getattr__ = lambda name: type(name, (), {})
    with mock.patch.object(linen.Module, "param", linen.Module.param):  # gemma replaces everybody's
        absent = sys.modules.setdefault("tensorflow", tensorflow) is tensorflow
        nn = importlib.import_module("gemma.gm.nn")
        models = {name: getattr(nn, name) for name in dir(nn) if name.startswith("Gemma")}
    if absent:
        del sys.modules["tensorflow"]

    def make(model: Any) -> Any:
        tokens, images = jnp.ones((1, 8), int), jnp.zeros((1, 1, 896, 896, 3), jnp.uint8)
        media = dict(images=images) if model.config.vision_encoder else {}
        return jax.eval_shape(lambda key: model.init(key, tokens, **media), jax.random.key(0))

    for name, model in models.items():
        yield name, name.split("_")[0].lower(), lambda model=model: make(model())["params"]


def bare_package(name: str) -> None:
    """Puts a package without what its `__init__` imports in its place: data sets, trainers."""
    parent, _, last = name.rpartition(".")
    folders = importlib.import_module(parent).__path__ if parent else sys.path
    package = types.ModuleType(name)
    package.__spec__ = importlib.machinery.PathFinder.find_spec(name, folders)
    package.__path__ = [str(Path(folder) / last) for folder in folders]
    sys.modules.setdefault(name, package)


def shapes_of(params: Any) -> Shapes:
    """The trained parameters."""
    trained = nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params
    return {paths.show(path): shape for path, shape in paths.shapes(trained).items()}


def judge(library: str, name: str, architecture: str, shapes: Shapes) -> Judgement:
    """What is read of a model's parameters, next to what its source says."""
    found = Judgement(library, name, architecture)
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    params = traverse_util.unflatten_dict(leaves, sep="/")
    table = known_models.table(library, name, architecture)
    found.optax = misrouted_by_optax(params, shapes, table)
    found.layout, found.clips = layout_of(params)
    try:
        specs = traverse_util.flatten_dict(mc.muon_dimension_numbers(params), sep="/")
    except ValueError as error:
        found.error = str(error)
        return found
    for path, shape in shapes.items():
        (expected, _), spec = known_models.expected(path, shape, table), specs[path]
        read = None
        if spec is not None:
            (view,) = spec.views
            read = tuple(
                frozenset(i for i, axis in enumerate(view.axes) if set(axis) & set(side))
                for side in (view.rows, view.cols)
            )
        if read != expected:
            found.wrong.append(path)
    return found


def layout_of(params: Any) -> tuple[str, dict[str, int]]:
    """What `find_layout` says without a number of heads, and how many blocks there are to clip."""
    try:
        blocks = mc.layouts.find_blocks(mc.find_layout(params), params)
    except ValueError as error:
        return ("asks" if "heads=" in str(error) else str(error)[:200]), {}
    return "found", {
        "blocks": sum(block.layout.softmax for block in blocks),
        "behind a QK-norm": sum(bool(block.qk_norms) for block in blocks),
    }


def misrouted_by_optax(params: Any, shapes: Shapes, table: known_models.Table) -> dict[str, int]:
    """Attention kernels that `optax.contrib.muon` leaves to Adam, and embeddings and unembeddings
    that it takes."""
    state = jax.eval_shape(optax.contrib.muon(1e-3).init, params)
    muon = {
        path
        for path, leaf in paths.leaves(state.inner_states["muon"])
        if "mu" in path and getattr(leaf, "ndim", 0)
    }
    taken = {paths.show(path[path.index("mu") + 1 :]) for path in muon}
    counted = Counter[str]()
    for path, shape in shapes.items():
        _, kind = known_models.expected(path, shape, table)
        if kind and (path in taken) == (kind != "attention"):
            counted[kind] += 1
    return dict(counted)


def run(options: Options) -> Iterator[Judgement]:
    """Every model, judged."""
    makers = dict(maxtext=maxtext, transformers=transformers, tunix=tunix, gemma=gemma)
    for library in options.libraries:
        for name, architecture, make in makers[library]():
            if options.only and options.only not in name:
                continue
            kept = options.trees and options.trees / f"{library}-{name}.json"
            try:
                if kept and kept.exists():
                    read = json.loads(kept.read_text())
                    shapes = {path: tuple(shape) for path, shape in read.items()}
                else:
                    shapes = shapes_of(make())
                    if kept:
                        kept.parent.mkdir(parents=True, exist_ok=True)
                        kept.write_text(json.dumps(shapes))
                one = judge(library, name, architecture, shapes)
            except Exception as error:  # of others' code, or not in our table: reported as it is
                said = f"{type(error).__name__}: {str(error)[:200]}"
                yield Judgement(library, name, architecture, error=said, unmade=True)
                continue
            yield one


def summary(found: list[Judgement]) -> dict[str, Any]:
    """Counts by library, and every exception with its reason."""
    by_library: dict[str, Any] = {}
    for library in dict.fromkeys(one.library for one in found):
        some = [one for one in found if one.library == library and not one.unmade]
        architectures = {one.architecture for one in some}
        wrong = {one.architecture for one in some if not one.right}
        optax_count = Counter[str]()
        for one in some:
            optax_count.update(one.optax)
        by_library[library] = {
            "configurations": len(some),
            "right": sum(one.right for one in some),
            "architectures": len(architectures),
            "architectures right": len(architectures - wrong),
            "layout found": sum(one.layout == "found" for one in some),
            "layout asks for heads": sum(one.layout == "asks" for one in some),
            "attention blocks found": sum(one.clips.get("blocks", 0) for one in some),
            "of these behind a QK-norm": sum(o.clips.get("behind a QK-norm", 0) for o in some),
            "misrouted by optax": dict(optax_count),
        }
    exceptions = {
        f"{one.library}: {one.name}": {"error": one.error, "wrong": one.wrong}
        for one in found
        if not one.right
    }
    layouts = {f"{one.library}: {one.name}": one.layout for one in found if one.layout != "found"}
    return {"libraries": by_library, "exceptions": exceptions, "without a layout": layouts}


def main(options: Options) -> None:
    """Prints a line a model, and writes the record."""
    found = []
    for one in run(options):
        found.append(one)
        said = "right" if one.right else "not judged" if one.unmade else "not right"
        rich.print(f"{one.library:12} {one.name:28} {one.architecture:18} {said:10} {one.layout}")
    record = summary(found)
    table = Table()
    for header in ("", *record["libraries"]):
        table.add_column(header)
    for row in next(iter(record["libraries"].values()), {}):
        table.add_row(row, *(str(counts[row]) for counts in record["libraries"].values()))
    rich.print(table)
    for name, why in record["exceptions"].items():
        rich.print(f"{name}: {why['error'][:300] or ', '.join(why['wrong'][:8])}")
    if options.json is not None:
        setup = {"date": str(date.today()), "python": platform.python_version()}
        setup |= {"jax": jax.__version__, "optax": optax.__version__}
        every = [asdict(one) for one in found]
        options.json.write_text(json.dumps({"setup": setup, **record, "models": every}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
