"""QK-Clip, QuacK and the scale of updates, on kernels split over a mesh in any way.

Eight simulated devices give the numbers of one, and nothing as large as a kernel travels.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compiled import collectives
from muonclip_jax import layouts
from muonclip_jax._layouts.roles import GAIN_ROLES

KINDS = [AxisType.Auto, AxisType.Explicit]

# The order of sums depends on the sharding: float32 rounds at 6e-8, the numbers are of size 1.
TOLERANCE = 1e-5

# Milliseconds of run time: compiling fast is all that counts.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SMALL = {"layers": 4, "width": 8, "heads": 8, "kv": 4, "f": 4, "nope": 4, "rope": 4, "v": 4}
SMALL |= {"q_rank": 8, "kv_rank": 16}
LARGE = {"layers": 4, "width": 512, "heads": 8, "kv": 4, "f": 64, "nope": 64, "rope": 32, "v": 64}
LARGE |= {"q_rank": 256, "kv_rank": 384}


class Case(NamedTuple):
    """A layout, and its parameters: lengths by name, and after @ the mesh axes that split them."""

    layout: Callable[[Mapping[str, int]], layouts.Layout]
    parameters: dict[str, str]
    rule: str = "paper"

    @property
    def stacked(self) -> bool:
        return all("layers" in axes for axes in self.parameters.values())


def mla(s):
    return layouts.mla(s["nope"], s["rope"], s["v"], query_norm="q_norm", key_value_norm="kv_norm")


CASES = {
    "heads and inputs": Case(
        lambda s: layouts.mha(),
        {
            "query/kernel": "width@fsdp heads@tp f",
            "query/bias": "heads@tp f",
            "key/kernel": "width@fsdp heads@tp f",
            "key/bias": "heads@tp f",
            "value/kernel": "width@fsdp heads@tp f",
            "out/kernel": "heads@tp f width@fsdp",
        },
    ),
    "features, and heads over everything": Case(
        lambda s: layouts.mha(),
        {
            "query/kernel": "width@fsdp heads f@tp",
            "query/bias": "heads@tp f",
            "key/kernel": "width heads@fsdp,tp f",
            "key/bias": "heads f@fsdp",
            "value/kernel": "width heads@fsdp,tp f",
            "out/kernel": "heads f@tp width@fsdp",
        },
    ),
    "scanned, layers and heads": Case(
        lambda s: layouts.gqa(),
        {
            "query/kernel": "layers@fsdp width heads@tp f",
            "query/bias": "layers@fsdp heads@tp f",
            "key/kernel": "layers width@fsdp kv@tp f",
            "value/kernel": "layers width kv@fsdp f",
            "out/kernel": "layers@fsdp heads@tp f width",
        },
    ),
    "flat, groups": Case(
        lambda s: layouts.gqa(s["kv"], heads=s["heads"]),
        {
            "query/kernel": "width@tp heads*f@fsdp",
            "key/kernel": "width kv*f@fsdp,tp",
            "key/bias": "kv*f@tp",
            "value/kernel": "width kv*f@fsdp,tp",
            "out/kernel": "heads*f@tp width@fsdp",
        },
    ),
    "fused, parts cut across": Case(
        lambda s: layouts.fused_qkv(s["heads"]),
        {
            "qkv/kernel": "width@fsdp 3*heads*f@tp",
            "qkv/bias": "3*heads*f@tp",
            "out/kernel": "heads*f@tp width@fsdp",
        },
    ),
    "fused, transposed, groups": Case(
        lambda s: layouts.fused_qkv(s["heads"], s["kv"], axes="(part heads features) in"),
        {
            "qkv/kernel": "4*kv*f@fsdp,tp width",
            "qkv/bias": "4*kv*f@tp",
            "out/kernel": "width@fsdp heads*f@tp",
        },
    ),
    "latent": Case(
        mla,
        {
            "wq_a/kernel": "width@fsdp q_rank@tp",
            "q_norm/scale": "q_rank@tp",
            "wq_b/kernel": "q_rank@fsdp heads@tp nope+rope",
            "wkv_a/kernel": "width@fsdp kv_rank+rope",
            "wkv_a/bias": "kv_rank+rope@fsdp",
            "kv_norm/scale": "kv_rank",
            "wkv_b/kernel": "kv_rank@fsdp heads@tp nope+v",
            "wo/kernel": "heads@tp v width@fsdp",
        },
    ),
    "latent, scanned, flat": Case(
        mla,
        {
            "wq_a/kernel": "layers@tp width q_rank@fsdp",
            "q_norm/scale": "layers q_rank",
            "wq_b/kernel": "layers q_rank heads nope+rope@fsdp,tp",
            "wkv_a/kernel": "layers width@tp kv_rank+rope@fsdp",
            "kv_norm/scale": "layers@fsdp kv_rank@tp",
            "wkv_b/kernel": "layers kv_rank@fsdp heads*nope+heads*v@tp",
            "wo/kernel": "layers heads*v@tp width@fsdp",
        },
        rule="latent_norm",
    ),
}

each_case = pytest.mark.parametrize("name", CASES)
# On Auto axes the compiler sees the same program, without its types.
SLOW_KINDS = [
    pytest.param(kind, marks=() if kind == AxisType.Explicit else pytest.mark.slow)
    for kind in KINDS
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def mesh_of(kind, **axes):
    axes = axes or {"fsdp": 4, "tp": 2}
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def structs(case, sizes, mesh, dtype=jnp.float32):
    """The parameters' shapes, dtypes and shardings."""

    def parse(axes):
        lengths, specs = zip(*((*axis.split("@"), None)[:2] for axis in axes.split()), strict=True)
        # The lengths are sums of products of names.
        shape = tuple(
            sum(math.prod(sizes.get(n) or int(n) for n in t.split("*")) for t in length.split("+"))
            for length in lengths
        )
        spec = P(*(tuple(axis.split(",")) if axis else None for axis in specs))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    tree = {}
    for path, axes in case.parameters.items():
        module, leaf = path.split("/")
        tree.setdefault(module, {})[leaf] = parse(axes)
    return {"attn": tree}


def shardings_of(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)


def sown(case, sizes, put=jnp.asarray):
    """Of eight batches; twice, as by a block that is called twice. A quarter is above 1."""
    stack = (sizes["layers"],) if case.stacked else ()
    maxima = np.random.default_rng(9).normal(size=(*stack, 8, sizes["heads"])) - 1.5
    return {"attn": {"max_logits": (put(np.float32(maxima)), put(np.float32(maxima[..., ::-1])))}}


def frobenius(case, sizes):
    layout = case.layout(sizes)
    return optax.chain(mc.scale_by_quack(layout, 0.7, rule=case.rule), mc.qk_clip(layout, 1.0))


def two_steps(case, build, params, gradients, max_logits):
    """Parameters, updates and state after two steps, compiled with donated state."""
    tx = build(case, SMALL)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params, max_logits=max_logits)
        return optax.apply_updates(params, updates), updates, state

    step = quick_jit(step, donate_argnums=1)
    state = quick_jit(tx.init)(params)
    params, _, state = step(params, state, gradients)
    return step(params, state, gradients)


def on_a_mesh(case, build, kind):
    mesh = mesh_of(kind)
    like = structs(case, SMALL, mesh)
    params, gradients = (
        jax.device_put(random_like(like, seed), shardings_of(like)) for seed in (0, 1)
    )
    split = NamedSharding(mesh, P(*(None,) * case.stacked, "fsdp", "tp"))
    max_logits = sown(case, SMALL, lambda x: jax.device_put(x, split))
    return two_steps(case, build, params, gradients, max_logits)


@functools.cache
def on_one_device(name, build):
    case = CASES[name]
    like = structs(case, SMALL, mesh_of(AxisType.Auto))
    params, gradients = (jax.tree.map(jnp.asarray, random_like(like, seed)) for seed in (0, 1))
    return two_steps(case, build, params, gradients, sown(case, SMALL))


@pytest.mark.parametrize("kind", SLOW_KINDS, ids=lambda kind: kind.name)
@each_case
def test_the_numbers_of_one_device(name, kind):
    got = on_a_mesh(CASES[name], frobenius, kind)
    chex.assert_trees_all_close(got, on_one_device(name, frobenius), rtol=TOLERANCE, atol=TOLERANCE)
    params, updates, (_, clip) = got
    assert 0 < clip.heads_clipped < clip.gamma["attn"].size
    if kind == AxisType.Explicit:
        given = shardings_of(structs(CASES[name], SMALL, mesh_of(kind)))
        for tree in (params, updates):
            for x, sharding in zip(*map(jax.tree.leaves, (tree, given)), strict=True):
                assert x.sharding.is_equivalent_to(sharding, x.ndim)
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(got[2]))


def travelling(tx, case, kind, dtype):
    """Bytes that all collectives of an update together leave on a device."""
    mesh = mesh_of(kind)
    params = structs(case, LARGE, mesh, dtype)
    state = jax.eval_shape(tx.init, params)
    stack = (LARGE["layers"],) if case.stacked else ()
    everywhere = NamedSharding(mesh, P())
    state, max_logits = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)
        for tree in (state, {"attn": {"max_logits": jnp.zeros((*stack, LARGE["heads"]))}})
    )
    update = lambda u, s, p, m: tx.update(u, s, p, max_logits=m)  # noqa: E731
    out = (shardings_of(params), everywhere) if kind == AxisType.Auto else None
    compiled = quick_jit(update, out_shardings=out).lower(params, state, params, max_logits)
    return sum(op.bytes * op.times for op in collectives(compiled.compile()))


def bytes_of_rows(case):
    """Bytes of a float32 row (one input) of every kernel of queries and keys, and of the smallest
    of these kernels."""
    params = structs(case, LARGE, mesh_of(AxisType.Auto))
    (block,) = layouts.find_blocks(case.layout(LARGE), params)
    parts = {part.kernel: part for part in block.parts if part.role not in ("v", "o")}
    sizes = {path: 4 * math.prod(part.shape) for path, part in parts.items()}
    kernels = {path: part for path, part in parts.items() if part.role not in GAIN_ROLES}
    rows = sum(sizes[path] // (part.ins if path in kernels else 1) for path, part in parts.items())
    return rows, min(sizes[path] for path in kernels)


@each_kind
@each_case
def test_rows_of_kernels_travel_not_kernels(name, kind):
    case = CASES[name]
    layout = case.layout(LARGE)
    tx = optax.chain(mc.scale_by_quack(layout, rule=case.rule), mc.qk_clip(layout))
    rows, smallest = bytes_of_rows(case)
    # The squares' sums over inputs; for half precision (`lost_heads`) two more sums; and
    # factors on their way back to where the kernel lies, at times by way of another sharding.
    allowed = 16 * rows
    assert allowed < smallest / 2
    assert travelling(tx, case, kind, jnp.bfloat16) <= allowed


@each_kind
def test_update_sizes_of_pieces_and_heads(kind):
    """A factor for every matrix: the values' heads, side by side, are a wide one."""
    s = SMALL
    layout = layouts.mla(s["nope"], s["rope"], s["v"])
    kernels = {
        path: axes for path, axes in CASES["latent"].parameters.items() if path.endswith("kernel")
    }
    like = structs(Case(lambda s: layout, kernels), s, mesh_of(kind), jnp.bfloat16)
    updates = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_like(like, 0))
    updates = jax.device_put(updates, shardings_of(like))
    values = mc.Granularity(heads={"v": "all"})
    routing = functools.partial(mc.muon_dimension_numbers, layout=layout, granularity=values)
    tx = mc.scale_by_update_rms(lambda ins, outs: 100 * ins + outs, dimension_numbers=routing)
    compiled = quick_jit(lambda u: tx.update(u, tx.init(u))[0]).lower(updates).compile()
    assert collectives(compiled) == []
    scaled = compiled(updates)["attn"]

    rank, heads = s["kv_rank"], s["heads"]
    factors = {
        "wq_a": [(s["q_rank"], 100 * s["width"] + s["q_rank"])],
        "wq_b": [(s["nope"], 100 * s["q_rank"] + s["nope"])] * 2,  # nope and rope are as long
        "wkv_a": [(rank, 100 * s["width"] + rank), (s["rope"], 100 * s["width"] + s["rope"])],
        "wkv_b": [(s["nope"], 100 * rank + s["nope"]), (s["v"], 100 * rank + heads * s["v"])],
        "wo": [(s["width"], 100 * s["v"] + s["width"])],
    }
    for name, pieces in factors.items():
        factor = np.concatenate([np.full(n, f) for n, f in pieces]).astype(jnp.bfloat16)
        kernel = updates["attn"][name]["kernel"]
        # One multiplication in bfloat16, whose rounding is defined.
        np.testing.assert_array_equal(scaled[name]["kernel"], np.asarray(kernel) * factor)
        assert scaled[name]["kernel"].dtype == jnp.bfloat16
        assert scaled[name]["kernel"].sharding.is_equivalent_to(kernel.sharding, kernel.ndim)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_parameters_to_parameters_on_an_explicit_mesh(jit):
    """Without `jax.set_mesh`, and with maxima of which the heads are split."""
    case, mesh = CASES["heads and inputs"], mesh_of(AxisType.Explicit)
    like = structs(case, SMALL, mesh)
    host = random_like(like, 0)
    params = jax.device_put(host, shardings_of(like))
    maxima = np.linspace(-1, 6, SMALL["heads"], dtype=np.float32)
    layout = case.layout(SMALL)
    clip = lambda p, s: mc.apply_qk_clip(p, {"attn": {"max_logits": s}}, layout, 1.0)  # noqa: E731
    clip = jax.jit(clip) if jit else clip
    clipped = clip(params, jax.device_put(maxima, NamedSharding(mesh, P("tp"))))
    # The same operations on every entry; XLA may contract a product.
    chex.assert_trees_all_close(clipped, clip(host, maxima), rtol=1e-6, atol=0)
    for x, s in zip(*map(jax.tree.leaves, (clipped, shardings_of(like))), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)


def test_numbers_that_are_traced_may_live_on_the_mesh():
    """Under `optax.inject_hyperparams` the threshold is an array of the state."""
    case, mesh = CASES["heads and inputs"], mesh_of(AxisType.Explicit)
    like = structs(case, SMALL, mesh)
    params = jax.device_put(random_like(like, 0), shardings_of(like))
    layout = case.layout(SMALL)

    def tx(threshold, rate):
        quack = optax.inject_hyperparams(mc.scale_by_quack, static_args="layout")
        clip = optax.inject_hyperparams(mc.qk_clip, static_args="layout")
        return optax.chain(
            quack(layout=layout, relative_learning_rate=rate),
            clip(layout=layout, threshold=threshold),
        )

    with jax.set_mesh(mesh):
        step = quick_jit(lambda u, s, p: tx(1.0, 0.5).update(u, s, p, max_logits=sown(case, SMALL)))
        state = quick_jit(tx(lambda count: 1.0 + count, lambda count: 0.5).init)(params)
        got, _ = step(params, state, params)
    plain = optax.chain(mc.scale_by_quack(layout, 0.5), mc.qk_clip(layout, 1.0))
    p = jax.tree.map(np.asarray, params)
    wanted, _ = quick_jit(plain.update)(p, plain.init(p), p, max_logits=sown(case, SMALL))
    chex.assert_trees_all_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    "context",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["no context", "set_mesh"],
)
def test_an_nnx_optimizer_on_an_explicit_mesh(context):
    mesh = mesh_of(AxisType.Explicit)
    layout = mc.layouts.mha()

    def trained(put):
        attention = nnx.MultiHeadAttention(4, 8, decode=False, rngs=nnx.Rngs(0))
        model = nnx.Dict(attn=attention)
        nnx.update(model, jax.tree.map(put, nnx.state(model, nnx.Param)))
        tx = optax.chain(mc.scale_by_quack(layout), optax.scale(-0.1), mc.qk_clip(layout, 1.0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, max_logits):
            gradients = jax.tree.map(lambda x: 0.5 * x, nnx.state(model, nnx.Param))
            optimizer.update(model, gradients, max_logits={"attn": {"max_logits": max_logits}})

        for _ in range(2):
            step(model, optimizer, put(jnp.array([4.0, 0.5, 9.0, 1.5])))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param)), mc.qk_clip_state(optimizer.opt_state)

    def split(x):
        spec = {3: P("fsdp", "tp"), 2: P("fsdp"), 1: P("tp")}[x.ndim]
        return jax.device_put(x, NamedSharding(mesh, spec if x.shape[0] % 4 == 0 else P()))

    wanted = trained(lambda x: x)
    if context:
        with jax.set_mesh(mesh):
            got = trained(split)
    else:
        got = trained(split)
    chex.assert_trees_all_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    kernel = got[0]["attn"]["query"]["kernel"]
    assert kernel.sharding.spec == P("fsdp", "tp", None)
    assert got[1].heads_clipped == 3
