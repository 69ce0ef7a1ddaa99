"""The chips that programs are compiled for: what each can do at most, and where that is written.

    CHIPS["h100"].flops["bfloat16"]     # 989.4e12

Rates are peaks, without sparsity. Bytes on links are of one direction, from one device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from benchmarks.compiled import Dot

# From the fastest to the slowest.
HLO_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}


@dataclass(frozen=True)
class Torus:
    """TPUs: each has two neighbours along each axis, and a link to each of them.

    Attributes:
      axes: Of the torus.
      link_rate: Bytes/s of one link, one way. A ring along an axis uses both links.
    """

    axes: int
    link_rate: float


@dataclass(frozen=True)
class Switched:
    """GPUs: those of a domain reach each other at NVLink's rate, others by InfiniBand.

    Attributes:
      domain: GPUs that NVLink connects; of an HGX board, eight.
      domain_rate: Bytes/s that one GPU sends to others of its domain, all together.
      network_rate: Bytes/s that one GPU sends beyond it.
    """

    domain: int
    domain_rate: float
    network_rate: float


@dataclass(frozen=True)
class Multiprocessors:
    """What XLA's GPU compiler asks about a GPU besides its memory.

    Attributes:
      count: Streaming multiprocessors.
      clock_ghz: Their boost clock.
      l2_bytes: The cache that they share.
      capability: CUDA's compute capability, its major number.
    """

    count: int
    clock_ghz: float
    l2_bytes: int
    capability: int


@dataclass(frozen=True)
class Chip:
    """A chip, and its peaks.

    Attributes:
      name: As its maker and JAX call it.
      platform: `"gpu"` or `"tpu"`.
      flops: Dtype of a product's factors → FLOP/s. `"float32"` is all of float32, as
        `precision="highest"` asks for it; `"default"` is what float32 factors get where nobody
        asks: on GPU TF32, on TPU bfloat16.
      hbm_rate: Bytes/s of its memory.
      hbm_bytes: Of its memory.
      links: To other chips.
      sources: Where these figures are from.
      multiprocessors: Of a GPU.
    """

    name: str
    platform: Literal["gpu", "tpu"]
    flops: Mapping[str, float]
    hbm_rate: float
    hbm_bytes: int
    links: Torus | Switched
    sources: tuple[str, ...]
    multiprocessors: Multiprocessors | None = None

    def dtype(self, dot: Dot) -> str:
        """By which of its rates a product is computed: that of the wider factor."""
        name = HLO_DTYPES[max(dot.dtypes, key=list(HLO_DTYPES).index)]
        return "default" if name == "float32" and dot.precision == "default" else name

    def peak(self, dot: Dot) -> float:
        """FLOP/s of such a product."""
        return self.flops[self.dtype(dot)]


def _gpu_flops(bfloat16: float, tf32: float, float32: float, float64: float) -> dict[str, float]:
    return {
        "bfloat16": bfloat16,
        "float16": bfloat16,
        "default": tf32,
        "float32": float32,
        "float64": float64,
    }


def _tpu_flops(bfloat16: float) -> dict[str, float]:
    """float32 is six products of bfloat16 parts: https://docs.jax.dev/en/latest/_autosummary/
    jax.lax.Precision.html. float16 is converted, float64 is not there."""
    return {
        "bfloat16": bfloat16,
        "float16": bfloat16,
        "default": bfloat16,
        "float32": bfloat16 / 6,
    }


_HOPPER = _gpu_flops(bfloat16=989.4e12, tf32=494.7e12, float32=66.9e12, float64=66.9e12)
_XLA_SPECS = "https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs"
_HOPPER_PAPER = "NVIDIA H100 Tensor Core GPU Architecture, V1.04, table 3 (peaks of H100 SXM5)"
_CLOUD = "https://cloud.google.com/tpu/docs/"

# Memory, multiprocessors, clock and cache of the GPUs are what their drivers report, as _XLA_SPECS
# has it. NVLink's and InfiniBand's rates are half of what data sheets print, which add both ways.
CHIPS: dict[str, Chip] = {
    "h100": Chip(
        name="NVIDIA H100 80GB HBM3",
        platform="gpu",
        flops=_HOPPER,
        hbm_rate=3.35232e12,
        hbm_bytes=84942979072,
        links=Switched(domain=8, domain_rate=450e9, network_rate=50e9),
        sources=(
            _HOPPER_PAPER,
            f"{_XLA_SPECS}/h100_sxm.txtpb",
            "NVIDIA DGX H100 datasheet: NVLink 900 GB/s a GPU, eight ConnectX-7 of 400 Gb/s",
        ),
        multiprocessors=Multiprocessors(132, 1.98, 52428800, 9),
    ),
    "h200": Chip(
        name="NVIDIA H200 141GB HBM3e",
        platform="gpu",
        flops=_HOPPER,
        hbm_rate=4.8e12,
        hbm_bytes=151397597184,
        links=Switched(domain=8, domain_rate=450e9, network_rate=50e9),
        sources=(
            _HOPPER_PAPER,
            f"{_XLA_SPECS}/h200.txtpb",
            "NVIDIA DGX H200 datasheet: NVLink 900 GB/s a GPU, eight ConnectX-7 of 400 Gb/s",
        ),
        multiprocessors=Multiprocessors(132, 1.98, 52428800, 9),
    ),
    "b200": Chip(
        name="NVIDIA B200",
        platform="gpu",
        flops=_gpu_flops(bfloat16=2250e12, tf32=1125e12, float32=75e12, float64=37e12),
        hbm_rate=7.67232e12,
        hbm_bytes=191514411008,
        links=Switched(domain=8, domain_rate=900e9, network_rate=50e9),
        sources=(
            "NVIDIA HGX B200 datasheet: an eighth of its board's peaks",
            f"{_XLA_SPECS}/b200.txtpb",
            "NVIDIA DGX B200 datasheet: NVLink 1.8 TB/s a GPU, eight ConnectX-7 of 400 Gb/s",
        ),
        multiprocessors=Multiprocessors(148, 1.965, 132644864, 10),
    ),
    # The rates of links are those between chips, both ways, over 2 × the number of links.
    "v5e": Chip(
        name="TPU v5 lite",
        platform="tpu",
        flops=_tpu_flops(197e12),
        hbm_rate=819e9,
        hbm_bytes=16 * 2**30,
        links=Torus(axes=2, link_rate=50e9),
        sources=(f"{_CLOUD}v5e",),
    ),
    "v5p": Chip(
        name="TPU v5",
        platform="tpu",
        flops=_tpu_flops(459e12),
        hbm_rate=2765e9,
        hbm_bytes=95 * 2**30,
        links=Torus(axes=3, link_rate=100e9),
        sources=(f"{_CLOUD}v5p",),
    ),
    "v6e": Chip(
        name="TPU v6 lite",
        platform="tpu",
        flops=_tpu_flops(918e12),
        hbm_rate=1638e9,
        hbm_bytes=32 * 2**30,
        links=Torus(axes=2, link_rate=100e9),
        sources=(f"{_CLOUD}v6e",),
    ),
}
