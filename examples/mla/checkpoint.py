"""Checkpoints of a run: all that a bit-exact continuation needs, written whole or not at all."""

import hashlib
import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

import muonclip_jax as mc
from examples.mla.cli import InputError
from examples.mla.mesh import everywhere, largest

FOLDER = "checkpoints"
DIGEST = "digest"

# Orbax logs every save, and what it raises too; after a failed read every other read that ran.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

_hook = sys.unraisablehook


def _without_late_reads(unraisable: Any) -> None:
    """After a failed read Orbax's others go on, and each complains that nobody waits for it."""
    if str(unraisable.exc_value) != "Event loop is closed":
        _hook(unraisable)


sys.unraisablehook = _without_late_reads


class Checkpoints:
    """The checkpoints of one run folder, by step; the newest two are kept.

    Orbax writes into a temporary folder and renames it when it is complete, so what an interrupted
    save leaves behind is never listed. One checkpoint holds the parameters, the optimizer's state
    (with the clip state), the position in the data, and `about`: settings and fingerprints. Orbax
    checks what it reads of the arrays; for the rest, `about` has a digest. Several processes save
    and restore at the same time, each its part of the arrays.

    Args:
      run_dir: The run's folder.
      read_only: Writes nothing and removes nothing: another process may be saving. Without it, what
        an interrupted save left is removed.
    """

    def __init__(self, run_dir: Path, *, read_only: bool = False):
        self.folder = run_dir / FOLDER
        writing = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(
            self.folder.absolute(),
            options=ocp.CheckpointManagerOptions(read_only=True) if read_only else writing,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
                "about": ocp.JsonCheckpointHandler(),
            },
        )

    @classmethod
    def existing(cls, run_dir: Path) -> "Checkpoints":
        """The checkpoints, read only, of a run that has at least one.

        Raises:
          InputError: It has none.
        """
        if (run_dir / FOLDER).is_dir():
            found = cls(run_dir, read_only=True)
            if found._manager.latest_step() is not None:
                return found
        raise InputError(
            f"{run_dir}: no complete checkpoint there; give the folder of a run that has saved "
            "one, or start a run without --resume, in a new folder"
        )

    @property
    def latest(self) -> int:
        """The step of the newest complete checkpoint; there must be one (see `existing`)."""
        step = self._manager.latest_step()
        assert step is not None
        return step

    def save(
        self,
        step: int,
        model: nnx.Module,
        optimizer: nnx.Optimizer,
        *,
        position: dict[str, Any],
        about: dict[str, Any],
    ) -> None:
        """Writes a checkpoint; when it returns, it is on disk.

        Raises:
          InputError: It could not be written.
        """
        about = {**about, DIGEST: digest(step, position, about)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(nnx.state((model, optimizer))),
            position=ocp.args.JsonSave(position),
            about=ocp.args.JsonSave(about),
        )
        try:
            self._manager.save(step, args=items)
        except Exception as error:  # not an OSError alone: tensorstore has its own
            raise InputError(
                f"{self.folder}: step {step} could not be saved; what was saved before is "
                f"whole, --resume goes on from there ({_in_short(error)})"
            ) from error

    def about(self) -> dict[str, Any]:
        """The newest checkpoint's settings and fingerprints.

        Raises:
          InputError: It does not read, or has none.
        """
        return self._position_and_about()[1]

    def is_older(self, model: nnx.Module, optimizer: nnx.Optimizer) -> bool:
        """Whether the newest checkpoint's state has another form: that of an older release."""
        with self.one_line_errors():
            return names(self._saved_shapes()) != names(nnx.state((model, optimizer)))

    def restore(self, model: nnx.Module, optimizer: nnx.Optimizer) -> dict[str, Any]:
        """Puts the newest checkpoint into the model and the optimizer, each array where theirs is:
        the mesh that saved it may have been another. The state of an older release is converted.

        Returns:
          The position in the data.

        Raises:
          InputError: The checkpoint does not read, or holds another model.
        """
        state = nnx.state((model, optimizer))
        older = self.is_older(model, optimizer)
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        position, _ = self._position_and_about()
        with self.one_line_errors():
            shapes = self._saved_shapes() if older else shapes
            saved = self._restore(state=ocp.args.StandardRestore(shapes))["state"]
            if older:
                upgrade(model, optimizer, plain(saved))
            else:
                nnx.update((model, optimizer), saved)
        return position

    def _position_and_about(self) -> tuple[dict[str, Any], dict[str, Any]]:
        with self.one_line_errors():
            saved = self._restore(about=ocp.args.JsonRestore(), position=ocp.args.JsonRestore())
            position, about = saved["position"], saved["about"]
            for item, needed in ((position, {"next_index"}), (about, {"settings", "text"})):
                if not isinstance(item, dict) or needed - item.keys():
                    raise ValueError(f"without its {' and '.join(sorted(needed))}")
            if type(position["next_index"]) is not int:
                raise ValueError(f"next_index is {position['next_index']}")
            found = about.pop(DIGEST, None)  # releases up to 0.1.0 saved none
            if found is not None and found != digest(self.latest, position, about):
                raise ValueError("settings or position are not what was saved")
        return position, about

    def _saved_shapes(self) -> dict[str, Any]:
        """The newest checkpoint's state as nested dictionaries of shapes, each array replicated."""
        tree = self._manager.item_metadata(self.latest)["state"].tree
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere()), tree
        )

    def _restore(self, **items: ocp.args.CheckpointArgs) -> Any:
        return self._manager.restore(self.latest, args=ocp.args.Composite(**items))

    @contextmanager
    def one_line_errors(self) -> Iterator[None]:
        """Turns whatever the newest checkpoint's content raises into an `InputError`."""
        try:
            yield
        except Exception as error:  # Orbax raises no less for a file cut short
            raise InputError(
                f"{self.folder / str(self.latest)}: damaged, or not a checkpoint of this model; "
                f"move it away to resume from the one before ({_in_short(error)})"
            ) from error


def digest(step: int, position: dict[str, Any], about: dict[str, Any]) -> str:
    """A hash of what a checkpoint has beside its arrays."""
    return hashlib.sha256(json.dumps([step, position, about], sort_keys=True).encode()).hexdigest()


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 100 else f"{text[:60]} … {text[-40:]}"


def upgrade(model: nnx.Module, optimizer: nnx.Optimizer, saved: dict[str, Any]) -> None:
    """Puts the state of an older release into the model and the optimizer.

    Args:
      model: The model.
      optimizer: Its optimizer.
      saved: Arrays in dictionaries by name: the model is "0", the optimizer "1".
    """
    ours = {"opt_state": optimizer.opt_state, "step": optimizer.step}
    upgraded: Any = mc.upgrade_state(saved, like=plain((nnx.state(model), ours)))
    nnx.update(model, upgraded[0])
    jax.tree.map(
        lambda variable, new: variable.set_value(new),
        ours,
        upgraded[1],
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def names(tree: Any) -> set[str]:
    """The path of every array of a state, as Orbax spells it."""
    paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path in paths}


def plain(tree: Any) -> Any:
    """A tree with arrays in the place of NNX's variables, and of what Orbax restores of them."""

    def is_variable(x: Any) -> bool:
        return isinstance(x, nnx.Variable) or (isinstance(x, dict) and x.keys() == {"value"})

    def array(x: Any) -> Any:
        return x["value"] if isinstance(x, dict) else x.get_value()

    return jax.tree.map(lambda x: array(x) if is_variable(x) else x, tree, is_leaf=is_variable)


class StopSignal:
    """Notes the first Ctrl-C or SIGTERM, so that the loop can finish its step before it ends.

    A second signal acts at once, as without this class.
    """

    def __init__(self):
        self.number: int | None = None
        self._before = {}
        self._largest: Any = 0

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> int | None:
        """The signal that ends the loop after this step, if any. Call it once a step.

        All processes get the same answer at the same step, whichever of them got the signal. With
        several processes the answer is one step old, so that no device waits for the hosts.
        """
        if jax.process_count() == 1:
            return self.number
        known, self._largest = self._largest, largest(self.number or 0)
        return int(known) or None

    def _note(self, number: int, _frame: object) -> None:
        self.number = number
        self.__exit__()
