"""MaxText's own training with MuonClip: the launcher of docs/how-to/trainers.md, and what is read.

python -m tests.models.launch_maxtext seen.json CONFIG key=value ...
"""

import functools
import json
import sys

import jax
from maxtext.trainers.pre_train import train

import muonclip_jax as mc

COUNTS = ("heads_clipped", "nonfinite_heads", "lost_heads", "max_logits")


def seen(state) -> dict:
    """What the clip's state holds at the end, of the tree that MaxText keeps."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["optimizer"]):
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        for name in COUNTS:
            if name in names:
                found.setdefault(name, []).append(leaf.tolist())
    return found


def main(out: str, *arguments: str) -> None:
    mc.use_in_maxtext(functools.partial(mc.muonclip, threshold=1.0))
    train_loop, states = train.train_loop, []
    train.train_loop = lambda *given: states.append(train_loop(*given))
    train.main(["train.py", *arguments])
    with open(out, "w") as file:
        json.dump(seen(states[0]), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
