"""What a run runs on: simulated devices, a mesh of all devices, several processes."""

import contextlib
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils

from examples.mla.cli import InputError
from examples.mla.mesh import AXES, BATCH_AXES, make_mesh

Made = TypeVar("Made")


@dataclass(frozen=True)
class Devices:
    """The flags about devices. They are not part of the run: give them again with --resume."""

    mesh: Annotated[str | None, tyro.conf.arg(metavar="fsdp=4,tp=2")] = None
    """Spread the run over all devices: fsdp splits parameters, optimizer state and batch, tp heads
    and MLP features, data the batch alone."""
    simulate_devices: int | None = None
    """Split the CPU into this many devices (of each process), to try a mesh."""
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Be one of --processes; they meet at this address, the address of process 0."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0."""
    distributed: bool = False
    """Be one of the processes of a cluster that JAX recognizes by itself (Slurm, a TPU pod)."""

    def __post_init__(self):
        self.axes  # noqa: B018 (raises)
        if self.simulate_devices is not None and self.simulate_devices < 1:
            raise ValueError(f"--simulate-devices must be at least 1, got {self.simulate_devices}")
        if self.coordinator is not None and self.processes is not None and self.process is not None:
            self._check_meeting(self.coordinator, self.processes, self.process)
        elif (self.coordinator, self.processes, self.process) != (None, None, None):
            raise ValueError(
                "--coordinator, --processes and --process go with one another; give all three"
            )
        if self.several and not self.axes:
            raise ValueError(
                "several processes train one model on a mesh of all their devices; say which with "
                "--mesh, such as --mesh fsdp=8"
            )

    def _check_meeting(self, coordinator: str, processes: int, process: int) -> None:
        if self.distributed:
            raise ValueError("--distributed finds the coordinator by itself; leave one of them out")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"--coordinator {coordinator}: not HOST:PORT")
        if not 0 <= process < processes:
            raise ValueError(f"--process {process} of --processes {processes}: they count from 0")

    @property
    def axes(self) -> dict[str, int]:
        """Mesh axis → size, in the order given; empty without a mesh."""
        axes = {}
        for part in self.mesh.split(",") if self.mesh is not None else ():
            name, _, size = part.partition("=")
            if name not in AXES or name in axes or not size.isdecimal() or int(size) < 1:
                raise ValueError(
                    f"--mesh {self.mesh}: {part!r} is not one of {', '.join(AXES)} with its size, "
                    "each given once; write for instance fsdp=4,tp=2"
                )
            axes[name] = int(size)
        return axes

    @property
    def several(self) -> bool:
        """Whether this is one of several processes."""
        return self.distributed or self.coordinator is not None

    @property
    def batch_parts(self) -> int:
        """The number of parts that the batch is split into."""
        return math.prod(self.axes.get(name, 1) for name in BATCH_AXES)

    def start(self) -> None:
        """Makes the devices and joins the other processes. Call it before anything else uses JAX.

        Raises:
          InputError: JAX has started already, runs on something else, finds no cluster, or has
            another number of devices than the mesh.
        """
        if self.simulate_devices is not None:
            _configure(self.simulate_devices)
        if self.several:
            self._join()
        if self.simulate_devices is not None and jax.default_backend() != "cpu":
            raise InputError(
                f"--simulate-devices makes CPU devices, and JAX runs on {jax.default_backend()}; "
                "leave it out, or set JAX_PLATFORMS=cpu"
            )
        wanted = math.prod(self.axes.values())
        if self.axes and wanted != jax.device_count():
            raise InputError(
                f"--mesh {self.mesh} takes {wanted} devices, found {jax.device_count()}; its sizes "
                "multiply to the number of devices (on CPUs, --simulate-devices makes them)"
            )

    def _join(self) -> None:
        try:
            jax.distributed.initialize(self.coordinator, self.processes, self.process)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"the processes did not meet: {' '.join(str(error).split())} (where JAX "
                "finds no cluster, give --coordinator, --processes and --process)"
            ) from error

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """A context in which everything runs on the mesh, if one is given."""
        return jax.set_mesh(make_mesh(self.axes)) if self.axes else contextlib.nullcontext()


def _configure(count: int) -> None:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise InputError(
            f"--simulate-devices {count} comes too late, JAX has started already; give it to the "
            "command line of a new process"
        ) from error


def describe() -> str:
    """The devices in words, and the mesh if there is one."""
    kind, mesh = jax.devices()[0].device_kind, jax.sharding.get_mesh()
    if mesh.empty:
        return kind
    axes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{mesh.size} × {kind}{processes}, mesh {axes}"


def is_first() -> bool:
    """Whether this process prints, and writes what only one process writes."""
    return jax.process_index() == 0


def in_every_process(
    make: Callable[[], Made], alike: Callable[[Made], object] = lambda _: None
) -> Made:
    """Calls `make` in every process. If it fails in one, it fails in all, so that no process waits
    for another that has gone.

    Args:
      make: May raise an `InputError` or `OSError`.
      alike: What all processes must have in common, of that which `make` returns.

    Raises:
      InputError: It failed in another process, or they have not got the same.
    """
    if not jax.distributed.is_initialized():
        return make()

    def gathered(digest: bytes) -> np.ndarray:  # one row a process
        return multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))

    try:
        made = make()
        digest = hashlib.sha256(repr(alike(made)).encode()).digest()
    except (InputError, OSError):
        gathered(bytes(32))  # zeros: this process failed
        raise
    digests = gathered(digest)
    if not digests.any(axis=1).all():
        raise InputError("another process cannot start; its own output says why")
    if (digests != digests[0]).any():
        raise InputError("the processes have different flags or text; give all of them the same")
    return made
