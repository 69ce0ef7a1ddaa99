"""QuacK in float64 NumPy, transcribed from arXiv 2511.21377 with a loop for every head.

Each function takes one layer: for each role a list of matrices, one a head (one in all for what
heads share), now and at initialisation, and gives back a list of factors. Matrices are `[in, out]`,
the bias being the last row; `size` is the norm.
"""

import numpy as np


def frobenius(matrix):
    return np.sqrt(sum(float(x) ** 2 for x in np.ravel(matrix)))


def algorithm_1(now, first, tau, size=frobenius):
    """MHA: η_Q ∝ 1/‖W_K‖ and η_K ∝ 1/‖W_Q‖, over their values at initialisation."""
    factors = {"q": [], "k": []}
    for head in range(len(now["q"])):
        factors["q"].append(tau * size(first["k"][head]) / size(now["k"][head]))
        factors["k"].append(tau * size(first["q"][head]) / size(now["q"][head]))
    return factors


def grouped(now, first, tau, size=frobenius):
    """GQA: head h reads key h // group; a key is treated as the paper treats shared matrices."""
    group = len(now["q"]) // len(now["k"])
    factors = {"q": [], "k": []}
    for head in range(len(now["q"])):
        key = head // group
        factors["q"].append(tau * size(first["k"][key]) / size(now["k"][key]))
    for key in range(len(now["k"])):
        readers = range(key * group, (key + 1) * group)
        largest = max(size(now["q"][head]) for head in readers)
        largest_first = max(size(first["q"][head]) for head in readers)
        factors["k"].append(tau * largest_first / largest)
    return factors


def algorithm_2(now, first, tau, size=frobenius, normalized_min=False):
    """MLA: τ times the table's entry now over its entry at initialisation."""
    a, b = algorithm_2_table(now, size), algorithm_2_table(first, size)
    factors = {
        role: [tau * x / y for x, y in zip(a[role], b[role], strict=True)]
        for role in ("q_nope", "k_nope", "q_rope", "kv_down", "k_rope")
    }
    if "q_down" in now:
        if normalized_min:
            least = min(x / y for x, y in zip(a["q_down"], b["q_down"], strict=True))
        else:
            least = min(a["q_down"]) / min(b["q_down"])
        factors["q_down"] = [tau * least]
    return factors


def algorithm_2_table(w, size=frobenius):
    """The entries of the table, for each head; of W_dq, the two that its `min` is over."""
    n = {role: [size(matrix) for matrix in matrices] for role, matrices in w.items()}
    uq, uk, qr, kr, dkv = n["q_nope"], n["k_nope"], n["q_rope"], n["k_rope"][0], n["kv_down"][0]
    dq = n["q_down"][0] if "q_down" in n else 1.0
    heads = range(len(uq))
    return {
        "q_nope": [1 / (dq * uk[h] * dkv) for h in heads],
        "k_nope": [1 / (uq[h] * dq * dkv) for h in heads],
        "q_rope": [1 / (dq * kr) for h in heads],
        "q_down": [1 / max(uq[h] * uk[h] * dkv for h in heads), 1 / max(qr[h] * kr for h in heads)],
        "kv_down": [1 / max(uq[h] * dq * uk[h] for h in heads)],
        "k_rope": [1 / max(qr[h] * dq for h in heads)],
    }


def latent_norm(now, first, tau, size=frobenius):
    """MLA behind RMSNorm on the latents: gains in place of the down-projections, whose own
    changes count relative to their size."""

    def table(w):
        n = {role: [size(matrix) for matrix in matrices] for role, matrices in w.items()}
        uq, uk, qr, kr, dkv = n["q_nope"], n["k_nope"], n["q_rope"], n["k_rope"][0], n["kv_down"][0]
        gkv = n["kv_gain"][0]
        gq, dq = (n["q_gain"][0], n["q_down"][0]) if "q_down" in n else (1.0, 1.0)
        heads = range(len(uq))
        nope = max(uq[h] * uk[h] for h in heads)
        rope = max(qr[h] for h in heads) * kr
        return {
            "q_nope": [1 / (gq * uk[h] * gkv) for h in heads],
            "k_nope": [1 / (uq[h] * gq * gkv) for h in heads],
            "q_rope": [1 / (gq * kr) for h in heads],
            "k_rope": [1 / max(qr[h] * gq for h in heads)],
            "kv_down": [dkv / (gkv * nope * gq)],
            "kv_gain": [1 / (nope * gq)],
            "q_down": [dq / (gq * nope * gkv), dq / (gq * rope)],
            "q_gain": [1 / (nope * gkv), 1 / rope],
        }

    a, b = table(now), table(first)
    ratios = {role: [tau * x / y for x, y in zip(a[role], b[role], strict=True)] for role in a}
    return {
        role: [min(ratio)] if role in ("q_down", "q_gain") else ratio
        for role, ratio in ratios.items()
        if role in now
    }
