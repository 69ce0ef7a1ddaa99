"""The sources' formulas in float64 NumPy, as written there; nothing of the package is used.

MuonClip's box is in `tests/recipes/published.py`, QuacK's algorithms in
`tests/transforms/quack_reference.py`. Rows are tokens, kernels are `[in, out]`.

000, 001  V. Rosić, "QK-Norm seems to hurt Muon optimizer LLM training", Chinese and English
002       Su Jianlin, "QK-Clip", spaces.ac.cn/archives/11126
003       an article on QuacK, arXiv 2511.21377
004       a list of Su Jianlin's articles with their first formulas

and, of the field since, Y. Han et al., "QK-Normed MLA", arXiv 2606.16310 (its abstract).
"""

import numpy as np

# 002, "Problem": O = softmax(Q Kᵀ) V, the scale being part of Q and K; S_max of all pairs.


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def visible(length):
    return np.tril(np.ones((length, length), bool))


def attention(q, k, v):
    """One head, causal: `[T, f]` each."""
    logits = np.where(visible(len(q)), q @ k.T, -np.inf)
    return softmax(logits) @ v


def max_logit(q, k):
    """One head of a batch `[B, T, f]`: max over the batch, i and the j that i sees."""
    return max((q[b] @ k[b].T)[visible(q.shape[1])].max() for b in range(len(q)))


def soft_capped(q, k, v, cap):
    """002: softcap(x; τ) = τ tanh(x / τ)."""
    logits = np.where(visible(len(q)), cap * np.tanh(q @ k.T / cap), -np.inf)
    return softmax(logits) @ v


def rms_norm(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))


def rotated(x, base=10_000.0):
    """RoPE on pairs (i, i + f/2), `[T, f]`: as a matrix for each position."""
    half = x.shape[1] // 2
    rows = []
    for position, row in enumerate(x):
        angle = position * base ** (-np.arange(half) / half)
        cos, sin = np.diag(np.cos(angle)), np.diag(np.sin(angle))
        rows.append(row @ np.block([[cos, sin], [-sin, cos]]))
    return np.stack(rows)


# 002, MLA: "training" and "decoding", the two columns. `w` has lists of matrices, one a head, for
# qc, qr, kc, v, and c, kr for all heads.


def mla_training(x, w, scale):
    """Outputs of every head, `[heads, T, v]`, and their logits `[heads, T, T]`."""
    latent = x @ w["c"]
    outputs, logits = [], []
    for qc, qr, kc, v in zip(w["qc"], w["qr"], w["kc"], w["v"], strict=True):
        q = np.concatenate([x @ qc, rotated(x @ qr)], axis=-1)
        k = np.concatenate([latent @ kc, rotated(x @ w["kr"])], axis=-1)
        logits.append(scale * q @ k.T)
        outputs.append(softmax(np.where(visible(len(x)), logits[-1], -np.inf)) @ (latent @ v))
    return np.stack(outputs), np.stack(logits)


def mla_decoding(x, w, scale):
    """The same with W_kc in the query, and W_v behind the sum: all heads read one key."""
    latent = x @ w["c"]
    k = np.concatenate([latent, rotated(x @ w["kr"])], axis=-1)
    outputs = []
    for qc, qr, kc, v in zip(w["qc"], w["qr"], w["kc"], w["v"], strict=True):
        q = np.concatenate([x @ qc @ kc.T, rotated(x @ qr)], axis=-1)
        weights = softmax(np.where(visible(len(x)), scale * q @ k.T, -np.inf))
        outputs.append(weights @ latent @ v)
    return np.stack(outputs)


def partly_normalized(x, qc, qr, key, kr):
    """Partial QK-norm of a head: what decoding forms is normalized, its key of the latent not."""
    queries = np.concatenate([rms_norm(x @ qc), rotated(rms_norm(x @ qr))], axis=-1)
    keys = np.concatenate([key, rotated(rms_norm(x @ kr))], axis=-1)
    return queries, keys


# 2606.16310: whole QK-norm in decoding. A key's gain is part of the query, and of the rotary key
# that all heads share; what is left of the norm is one number a token and head.


def mla_decoding_normalized(x, w, scale, q_gain, k_gain):
    """As `mla_decoding`, of queries and keys that are normalized before RoPE."""
    latent = x @ w["c"]
    outputs = []
    for qc, qr, kc, v in zip(w["qc"], w["qr"], w["kc"], w["v"], strict=True):
        nope = qc.shape[1]
        inverse_rms = np.mean(np.hstack([latent @ kc, x @ w["kr"]]) ** 2, axis=-1) ** -0.5
        q = q_gain * rms_norm(np.hstack([x @ qc, x @ qr]))
        absorbed = np.hstack([(q[:, :nope] * k_gain[:nope]) @ kc.T, rotated(q[:, nope:])])
        cached = np.hstack([latent, rotated(x @ w["kr"] * k_gain[nope:])])
        logits = scale * absorbed @ cached.T * inverse_rms
        outputs.append(softmax(np.where(visible(len(x)), logits, -np.inf)) @ latent @ v)
    return np.stack(outputs)


# 002, the clips.


def first_version(weights, s_max, tau):
    """All of W_q and W_k of a layer, by √(τ / S_max) of the layer."""
    factor = np.sqrt(tau / s_max) if s_max > tau else 1.0
    return {name: w * factor for name, w in weights.items()}


def output_clip(w_o, output, tau):
    """ "Clip wherever it is unstable": W_o of a head `[f, out]`, by its own largest output."""
    return w_o * (tau / output if output > tau else 1.0)


def adamw(w, m, v, g, step, eta, b1, b2, eps, decay):
    """One step of Adam with decoupled decay of the old weight; steps count from 1."""
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    direction = (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + eps)
    return w - eta * (direction + decay * w), m, v


# 002 and 004, matrices.


def msign(m):
    """004: U[:, :r] V[:, :r]ᵀ, r being the rank."""
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    rank = int((s > 1e-12 * s[0]).sum())
    return u[:, :rank] @ vt[:rank]


def msign_by_root(m):
    """004: (M Mᵀ)^(-1/2) M, of a matrix whose rank is the number of its rows."""
    values, vectors = np.linalg.eigh(m @ m.T)
    return (vectors / np.sqrt(values)) @ vectors.T @ m


def mclip(m):
    """004: singular values by clip(x) = max(min(x, 1), -1)."""
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    return u @ np.diag(np.maximum(np.minimum(s, 1), -1)) @ vt


def mcsgn(m):
    """004: (M²)^(-1/2) M, the root by eigenvalues, whose real part is positive."""
    values, vectors = np.linalg.eig(m @ m)
    return np.real(vectors @ np.diag(values**-0.5) @ np.linalg.inv(vectors) @ m)


def msign_derivative(m, g):
    """004's article: A⁻¹G − 2YM, where AY + YA = sym(A⁻¹GOᵀ), A = (MMᵀ)^(1/2), by columns of a
    system of n² equations."""
    n = len(m)
    values, vectors = np.linalg.eigh(m @ m.T)
    a = vectors @ np.diag(values**0.5) @ vectors.T
    over = np.linalg.inv(a)
    s = over @ g @ (over @ m).T
    system = np.kron(a, np.eye(n)) + np.kron(np.eye(n), a)
    y = np.linalg.solve(system, ((s + s.T) / 2).ravel()).reshape(n, n)
    return over @ g - 2 * y @ m


def diagonal_plus_low_rank(diagonal, q, k):
    """004: T = Λ + QKᵀ⊙M⁻, M⁻ being M − I, and M one where i ≥ j."""
    i, j = np.indices((len(q), len(q)))
    return np.diag(diagonal) + (q @ k.T) * ((i >= j) - np.eye(len(q)))


def update_rms_factor(n, m):
    return np.sqrt(max(n, m)) * 0.2


def singular_value_entropy(m):
    """Moonlight's, to which 002 points: of σ² / Σσ², over log of their number."""
    s = np.linalg.svd(m, compute_uv=False)
    p = s**2 / (s**2).sum()
    return -sum(x * np.log(x) for x in p if x > 0) / np.log(len(s))


# 000 and 001.


def participation_ratio(keys):
    """(Σσ)² / Σσ² of the keys `[T, f]` of a head: 001 has the name, its repository the formula."""
    s = np.linalg.svd(keys, compute_uv=False)
    return s.sum() ** 2 / (s**2).sum()


# 003: a fixed lower rate for queries and keys, its first figure.


def fixed_lower_rate(w, direction, eta, relative, decay):
    """A learning rate multiplies the decay as well."""
    return w - eta * relative * (direction + decay * w)
