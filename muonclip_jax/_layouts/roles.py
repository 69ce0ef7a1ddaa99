"""What each piece of attention does to the logits: the one table of roles.

A logit is a sum of products of a query and a key, `q · k`; in multi-head latent attention of two,
`q_nope · k_nope + q_rope · k_rope`, each of which starts at a projection to a latent:

    x ─ q_down ─ (q_gain) ─ q_nope ─┐                ┌─ k_nope ─ (kv_gain) ─ kv_down ─ x
                          └ q_rope ─┴─ one logit a ──┴─ k_rope ─────────────────────── x
                                       query head

Nothing else knows these names but the layouts that declare them (`kinds.py`).
"""

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal[
    "q", "k", "v", "o", "gate",
    "q_nope", "q_rope", "k_nope", "k_rope",
    "q_down", "kv_down", "q_gain", "kv_gain",
]  # fmt: skip

Side = Literal["query", "key", "value", "latent", "gain"]


@dataclass(frozen=True)
class RoleFacts:
    """One row of the table.

    Attributes:
      side: Which side of the logit it is on; `"latent"` and `"gain"`: in front of a side's
        projections; `"value"`: behind the softmax.
      partner: The role that it is multiplied with in the logit.
      behind: The projection to a latent in front of it, if the layout has that.
      per_head: Whether every head has its own; else all heads share it.
    """

    side: Side
    partner: Role | None = None
    behind: Role | None = None
    per_head: bool = True


ROLES: dict[Role, RoleFacts] = {
    "q": RoleFacts("query", partner="k"),
    "k": RoleFacts("key", partner="q"),
    "q_nope": RoleFacts("query", partner="k_nope", behind="q_down"),
    "k_nope": RoleFacts("key", partner="q_nope", behind="kv_down"),
    "q_rope": RoleFacts("query", partner="k_rope", behind="q_down"),
    "k_rope": RoleFacts("key", partner="q_rope", per_head=False),
    "q_down": RoleFacts("latent", per_head=False),
    "kv_down": RoleFacts("latent", per_head=False),
    "q_gain": RoleFacts("gain", behind="q_down", per_head=False),
    "kv_gain": RoleFacts("gain", behind="kv_down", per_head=False),
    "v": RoleFacts("value"),
    "o": RoleFacts("value"),
    "gate": RoleFacts("value"),
}

# Of which a block may have several parameters: streams that attend to one another.
SEVERAL_ROLES: tuple[Role, ...] = ("q", "k", "v", "o", "gate")

EVERY_ROLE: tuple[Role, ...] = get_args(Role)


def _with(side: Side, *, per_head: bool) -> tuple[Role, ...]:
    return tuple(
        role for role, facts in ROLES.items() if facts.side == side and facts.per_head == per_head
    )


QUERY_ROLES = _with("query", per_head=True)
KEY_ROLES = _with("key", per_head=True)
SHARED_KEY_ROLES = _with("key", per_head=False)
LATENT_ROLES = _with("latent", per_head=False)
GAIN_ROLES = _with("gain", per_head=False)
# All that makes the logits: what is before the softmax.
LOGIT_ROLES: tuple[Role, ...] = tuple(
    role for role, facts in ROLES.items() if facts.side != "value"
)


def family(role: Role) -> set[str]:
    """The role and what it belongs to: `q_nope` is one of the queries, `q`."""
    return {role, role.split("_")[0]}


EqualLengths = tuple[Role, str, Role, str]

# Lengths that attention itself makes equal: (role, length, role, length). A wrong size in a layout
# rarely fits them all.
EQUAL_LENGTHS: tuple[EqualLengths, ...] = (
    ("q_nope", "heads", "q_rope", "heads"),
    ("q", "heads", "q_rope", "heads"),
    ("q_nope", "heads", "k_nope", "heads"),
    ("k", "heads", "v", "heads"),
    ("k_nope", "heads", "v", "heads"),
    ("q", "heads", "o", "heads"),
    ("q_nope", "heads", "o", "heads"),
    ("q", "heads", "gate", "heads"),
    ("v", "features", "o", "features"),
    ("v", "features", "gate", "features"),
    ("q_rope", "features", "k_rope", "features"),
    ("q_down", "features", "q_nope", "ins"),
    ("kv_down", "features", "k_nope", "ins"),
    ("q_gain", "features", "q_nope", "ins"),
    ("kv_gain", "features", "k_nope", "ins"),
)

# The same of linear attention, where several values may share a key.
EQUAL_LENGTHS_OF_LINEAR: tuple[EqualLengths, ...] = (
    ("q", "heads", "k", "heads"),
    ("q", "features", "k", "features"),
    ("v", "heads", "o", "heads"),
    ("v", "features", "o", "features"),
    ("v", "heads", "gate", "heads"),
    ("v", "features", "gate", "features"),
)
