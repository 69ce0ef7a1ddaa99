"""Which heads of attention make one matrix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from muonclip_jax._core import paths
from muonclip_jax._core.options import check_choice, check_count
from muonclip_jax._layouts.blocks import Block
from muonclip_jax._layouts.roles import EVERY_ROLE, ROLES, Role, family

Heads = int | Literal["all"]
Together = Literal["pairs", "kernel"] | tuple[tuple[Role, ...], ...]

# The pieces that MLA's kernels hold two of.
_PAIRS: tuple[tuple[Role, ...], ...] = (
    ("q_nope", "q_rope"),
    ("k_nope", "v"),
    ("kv_down", "k_rope"),
)


@dataclass(frozen=True)
class Granularity:
    """Which heads of attention make one matrix for Muon, and which pieces of a head.

    A kernel `[in, 4*8]` of queries, 4 heads of 8 features, or `[in, 4, 8]`, or a fused one:

        Granularity()               4 × [in, 8]     each head
        Granularity(heads=2)        2 × [in, 16]    heads 0 and 1, heads 2 and 3
        Granularity(heads="all")    1 × [in, 32]

    Published ones, of MLA's kernels (`wq_b` holds q_nope and q_rope, `wkv_b` k_nope and v of each
    head, `wkv_a` the latent and k_rope of all):

    | | `wq_b` | `wkv_b` | `wkv_a` | `wo` |
    | --- | --- | --- | --- | --- |
    | `Granularity()`, the default | q_nope, q_rope of a head apart | k_nope, v of a head apart | apart | a head |
    | `kimi_k2()` | whole | whole | whole | whole |
    | `kimi_k3()` | q_nope + q_rope of a head | k_nope + v of a head | whole | whole |
    | `glm_5()` | q_nope + q_rope of a head | k_nope, v of a head apart | whole | whole |
    | `Granularity(heads=g)` | of g heads, apart | of g heads, apart | apart | g heads |

    The last is Group Muon (Zhang et al., arXiv 2605.08933): how many heads is a hyper-parameter;
    in its runs with GPT-2 Small some groups gave a lower loss than whole kernels and than heads.

    Keys and values of grouped queries are counted as they are: `heads=4` makes matrices of four
    key heads. Where there are fewer, it raises; say `heads={"q": 4, "o": 4}` for a matrix a key
    head, or `{"q": 4, "o": 4, "k": "all", "v": "all"}`.

    Joined matrices are larger, and so are their updates by the rules of `scale_by_update_rms`,
    which take n and m of what is orthogonalized. Heads that lie on several devices become one
    matrix as any other that is split (`scale_by_orthogonalization` says at which cost).

    Attributes:
      heads: How many heads share a matrix, at least 1, neighbours in the order of the heads; or
        `"all"`. A mapping from roles says it for each, `{"q": 2, "o": "all"}`; what it does not
        name has 1. `"q"` and `"k"` also name MLA's parts of them. What all heads share (MLA's
        down-projections and rope key) has no heads and is one matrix.
      together: Which pieces of one parameter share a matrix; all others are apart, whether they
        lie in one kernel or in several. Groups of roles, `(("q_nope", "q_rope"), ("k_nope", "v"))`;
        `"pairs"`: these two and `("kv_down", "k_rope")`, in attention that has them; `"kernel"`:
        all of a kernel as it is stored, with `heads="all"` only.

    Raises:
      TypeError: When built, what is no number, role or group of roles.
      ValueError: When built, a number below 1, an unknown role, one that has no heads, one in two
        groups, or `together="kernel"` of fewer heads than all. By what takes it, with path, shape
        and fix: roles that the model does not have, heads that the number does not divide, pieces
        that are to be together and lie in different parameters or not side by side.

    Example:
      >>> rows = mc.describe(params, layout, granularity=mc.Granularity(heads={"o": "all"}))
      >>> print(*(m for row in rows if row.attention for m in row.matrices), sep=", ")
      k 2 × [8, 4], o 1 × [8, 8] of 2 heads, q 2 × [8, 4], v 2 × [8, 4]
    """  # noqa: E501

    heads: Heads | Mapping[Role, Heads] = 1
    together: Together = ()

    def __post_init__(self):
        heads: Any = self.heads
        if isinstance(heads, Mapping):
            object.__setattr__(self, "heads", tuple(sorted(heads.items(), key=str)))
        for role, number in _by_role(self) or (("", heads),):
            if role:
                _check_roles("heads", [role])
                if not ROLES[role].per_head:
                    raise ValueError(f"{self} names {role}, which all heads share: it has none.")
            if number != "all":
                check_count(f"Granularity: heads{role and f'[{role!r}]'} (or 'all')", number)
        if isinstance(self.together, str):
            check_choice("Granularity: together", self.together, ("pairs", "kernel"))
            if self.together == "kernel" and heads != "all":
                raise ValueError(
                    f'{self}: a kernel as it is stored holds all heads; give heads="all".'
                )
            return
        self._check_groups()

    @classmethod
    def kimi_k2(cls) -> "Granularity":
        """Each kernel of attention as one matrix, as it is stored.

        Moonlight's code (github.com/MoonshotAI/Moonlight), on which Kimi K2 (arXiv 2507.20534)
        builds, takes every parameter of two axes as it is; the report writes W as n × m and names
        heads in the clip only. A fused kernel is one matrix, too: that is this library's
        reading, since Kimi's models have none but MLA's.

        Example:
          >>> row, = mc.describe(
          ...     {"attn": {"qkv": {"kernel": jnp.ones((64, 3 * 64))}}},
          ...     mc.layouts.fused_qkv(8, out=None),
          ...     granularity=mc.Granularity.kimi_k2(),
          ... )
          >>> print(*row.matrices)
          q + k + v 1 × [64, 192] of 8 heads
        """
        return cls(heads="all", together="kernel")

    @classmethod
    def kimi_k3(cls) -> "Granularity":
        """Each head of queries, keys and values; nope and rope of a query head, and nope and v of a
        key/value head, as one matrix; output and MLA's down-projections whole.

        As public recipes for Kimi K3 have it, torchtitan's pull request 4596 first of all (its
        issue 4692 argues for nope and v apart, as `Granularity(heads={"o": "all"})` has them). The
        gate is split by heads; linear attention (`layouts.linear_attention`) is treated alike.

        Example:
          >>> mc.Granularity.kimi_k3()
          Granularity(heads={'o': 'all'}, together='pairs')
        """
        return cls(heads={"o": "all"}, together="pairs")

    @classmethod
    def glm_5(cls) -> "Granularity":
        """MLA's up-projections W_UQ, W_UK and W_UV by heads, the rest whole: GLM-5's "Muon Split".

        Source: arXiv 2602.15763. For MLA only; other attention raises. That nope and rope of a
        query head stay together is this library's reading of W_UQ.

        Example:
          >>> mc.Granularity.glm_5().together
          (('q_nope', 'q_rope'), ('kv_down', 'k_rope'))
        """
        return cls(heads={"o": "all"}, together=(("q_nope", "q_rope"), ("kv_down", "k_rope")))

    def _check_groups(self) -> None:
        groups: Any = self.together
        if not isinstance(groups, tuple) or not all(isinstance(few, tuple) for few in groups):
            raise TypeError(
                "Granularity: together must be groups of roles, (('q_nope', 'q_rope'), ('k_nope', "
                f"'v')), or 'pairs' or 'kernel', got {groups!r}."
            )
        named = [role for few in groups for role in few]
        _check_roles("together", named)
        if twice := {role for role in named if named.count(role) > 1}:
            raise ValueError(f"{self} has {', '.join(sorted(twice))} twice in together.")
        if alone := [few for few in groups if len(few) < 2]:
            raise ValueError(f"{self}: together has {alone[0]!r}; a group has two roles or more.")

    def __repr__(self) -> str:
        heads = dict(_by_role(self)) or self.heads
        return f"Granularity(heads={heads!r}, together={self.together!r})"


def groups_of(granularity: Granularity) -> tuple[tuple[Role, ...], ...]:
    """The roles that share a matrix, where a kernel holds them."""
    together = granularity.together
    if isinstance(together, str):
        return _PAIRS if together == "pairs" else ()
    return together


def heads_of(granularity: Granularity, role: Role) -> Heads:
    """How many heads of this role share a matrix."""
    every: Any = granularity.heads
    told: dict[str, Heads] = dict(_by_role(granularity))
    return told.get(role, told.get(role.split("_")[0], 1)) if told else every


def check_fits(granularity: Granularity, blocks: Sequence[Block]) -> None:
    """Raises ValueError for roles that no block has, and for those that are to be together and that
    a block has in different parameters."""
    groups = groups_of(granularity)
    named = () if granularity.together == "pairs" else groups
    asked = {role for role, _ in _by_role(granularity)} | {role for few in named for role in few}
    there = {role for block in blocks for part in block.parts for role in family(part.role)}
    if absent := asked - there:
        raise ValueError(
            f"{granularity}: no attention block of the layout has the role "
            f"{' or '.join(sorted(absent))}; they have {', '.join(sorted(there))}."
        )
    for block in blocks:
        for few in groups:
            found = [part for part in block.parts if part.role in few]
            inside: dict[paths.Path, set[Role]] = {}  # several streams have a kernel each
            for part in found:
                inside.setdefault(part.kernel, set()).add(part.role)
            if any(roles != {part.role for part in found} for roles in inside.values()):
                where = ", ".join(f"{p.role} in {paths.show(p.kernel)} {p.shape}" for p in found)
                raise ValueError(
                    f"{granularity}: {' and '.join(few)} are to share a matrix and lie in "
                    f"different parameters: {where}. Take them out of together=."
                )


def _by_role(granularity: Granularity) -> tuple[tuple[Role, Heads], ...]:
    heads: Any = granularity.heads
    return heads if isinstance(heads, tuple) else ()


def _check_roles(option: str, roles: Sequence[Any]) -> None:
    if unknown := [role for role in roles if role not in EVERY_ROLE]:
        raise ValueError(
            f"Granularity: {option} has {', '.join(map(repr, unknown))}, which is no role; "
            f"choose from {', '.join(EVERY_ROLE)}."
        )


PER_HEAD = Granularity()  # the default
