"""The example as a mixture of experts: what a token gets, on meshes too; matrices and report."""

import dataclasses
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from examples.mla import experts, figures, metrics, partition, report, settings, steps, train
from examples.mla.mesh import make_mesh
from examples.mla.model import EXPERT_LOAD, Decoder, Experts, ModelConfig

CONFIG = ModelConfig(d_model=12, d_ff=15, experts=4)
GOLDEN = pathlib.Path(__file__).parent / "golden-run"  # of a model without experts
QUICK = {"xla_backend_optimization_level": 0}


def mixture(seed=0):
    """Experts whose router tells tokens apart, and whose biases count."""
    module = Experts(CONFIG, nnx.Rngs(seed))
    module.router.kernel[...] *= 4
    module.bias[...] = jnp.array([0.3, 0.0, -0.2, 0.0])
    return module


X = jax.random.normal(jax.random.key(1), (4, 5, CONFIG.d_model))


@pytest.fixture(scope="module")
def module():
    return mixture()


@pytest.fixture(scope="module")
def called(module):
    """What the tokens got, and the load of the experts."""
    graph, state = nnx.split(module)
    forward = lambda state, x: nnx.capture(nnx.merge(graph, state), nnx.Intermediate)(x)  # noqa: E731
    return jax.jit(forward, compiler_options=QUICK)(state, X)


def swiglu(x, *kernels):
    gate, up, down = (np.asarray(kernel, np.float64) for kernel in kernels)
    inside = x @ gate
    return (inside / (1 + np.exp(-inside)) * (x @ up)) @ down


def by_hand(module, x):
    """float64, one token after the other; and how many tokens each expert got."""
    kernels = [each.kernel[...] for each in (module.gate, module.up, module.down)]
    shared = [getattr(module.shared, name).kernel[...] for name in ("gate", "up", "down")]
    out, counts = [], np.zeros(CONFIG.experts)
    for token in np.asarray(x, np.float64).reshape(-1, CONFIG.d_model):
        logits = token @ np.asarray(module.router.kernel[...], np.float64)
        scores = 1 / (1 + np.exp(-logits))
        two = np.argsort(scores + np.asarray(module.bias[...]))[-2:]
        given = [scores[e] * swiglu(token, *(kernel[e] for kernel in kernels)) for e in two]
        out.append(sum(given) / scores[two].sum() + swiglu(token, *shared))
        counts[two] += 1
    return np.reshape(out, x.shape), counts


def test_a_token_gets_its_two_experts_and_the_shared_one(module, called):
    (out, sown), (expected, counts) = called, by_hand(module, X)
    # Sums of some ten float32 products.
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
    (load,) = mc.read_signal(sown, EXPERT_LOAD).values()
    np.testing.assert_allclose(load, counts / counts.sum(), rtol=1e-6)
    assert counts.min() < counts.max()


def test_one_token_alone_gets_the_same_as_decoding_needs(module, called):
    out = module(X[:1, 3:4])
    np.testing.assert_allclose(out, called[0][:1, 3:4], atol=1e-5)


@pytest.mark.parametrize(
    "axes", [{"fsdp": 2, "tp": 2}, {"data": 3, "tp": 2}, {"tp": 8}], ids=lambda axes: "-".join(axes)
)
def test_a_mesh_changes_nothing(module, axes):
    """Experts and batch in parts; a batch that three devices cannot share, and more devices than
    experts: whole."""
    kernels = [each.kernel[...] for each in (module.gate, module.up, module.down)]
    chosen, weights = module.route(X)

    def loss(x, weights, kernels):
        return jnp.sum(jnp.sin(experts.mix(x, chosen, weights, kernels)))

    def gradients():
        both = jax.value_and_grad(loss, argnums=(0, 1, 2))
        return jax.jit(both, compiler_options=QUICK)(X, weights, kernels)

    alone = gradients()
    with jax.set_mesh(make_mesh(axes, jax.devices()[: np.prod([*axes.values()])])):
        found = gradients()
    for here, there in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(here, there, atol=1e-5 * np.abs(there).max())  # order of sums


def test_experts_are_split_over_tp_and_each_over_fsdp():
    mesh = {"fsdp": 2, "tp": 2}
    config = dataclasses.replace(CONFIG, d_ff=12)
    for name, expected in {
        "gate": P("tp", "fsdp", None),
        "down": P("tp", None, "fsdp"),
    }.items():
        path = ("layers", "0", "mlp", name, "kernel")
        assert partition.spec(path, 3, config, mesh) == expected
    shared = partition.spec(("mlp", "shared", "gate", "kernel"), 2, config, mesh)
    assert shared == P("fsdp", "tp")


def test_biases_even_out_the_loads():
    """Without a loss for it: tokens of which nearly all prefer the same expert."""
    module = mixture()
    module.bias[...] = jnp.array([1.0, 0.0, 0.0, 0.0])

    @nnx.jit
    def step(module):
        chosen, _ = module.route(X)
        load = jax.nn.one_hot(chosen, CONFIG.experts).mean((0, 1, 2))
        module.balance(load)
        return load

    loads = np.array([step(module) for _ in range(1200)])
    assert loads[0, 0] == 0.5  # all tokens, as one of their two
    np.testing.assert_allclose(loads[-50:].mean(0), 1 / CONFIG.experts, atol=0.03)


def test_layers_of_experts_can_be_scanned():
    layers = [mixture(seed) for seed in range(2)]
    graph = nnx.graphdef(layers[0])
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *map(nnx.state, layers))

    def one(x, layer):
        return nnx.capture(nnx.merge(graph, layer), nnx.Intermediate)(x)

    scanned, sown = jax.jit(lambda x: jax.lax.scan(one, x, stacked), compiler_options=QUICK)(X)
    expected, counts = X, []
    for layer in layers:
        expected, count = by_hand(layer, expected)
        counts.append(count / count.sum())
    np.testing.assert_allclose(scanned, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(mc.read_signal(sown, EXPERT_LOAD)[()], counts, rtol=1e-6)


def test_settings_of_earlier_releases_have_no_experts():
    saved = settings.Settings(run_dir=None).to_json()
    del saved["model"]["experts"]
    assert settings.Settings.from_json(saved).model.experts == 0


MODEL = ModelConfig(
    vocab_size=31, d_model=12, layers=1, heads=2, nope=4, rope=2, v=4, q_rank=0, kv_rank=6, d_ff=12,
    experts=4,
)  # fmt: skip


def test_each_expert_is_a_matrix_of_muon():
    params = nnx.eval_shape(lambda: nnx.state(Decoder(MODEL, nnx.Rngs(0)), nnx.Param))
    optimizer = steps.make_optimizer(settings.Settings(model=MODEL), MODEL)
    jax.eval_shape(optimizer.init, params)  # every parameter has a route
    rows = {row.path: [str(m) for m in row.matrices] for row in mc.describe(params)}
    assert rows["layers/0/mlp/up/kernel"] == ["4 × [12, 4]"]
    assert rows["layers/0/mlp/down/kernel"] == ["4 × [4, 12]"]
    assert rows["layers/0/mlp/router/kernel"] == ["1 × [12, 4]"]


def test_the_report_shows_the_busiest_expert_in_fair_shares():
    rows = [
        {**row, EXPERT_LOAD: {"mlp": [0.4, 0.1, 0.3, 0.2]}} if row["event"] == "step" else row
        for row in metrics.read(GOLDEN)
    ]
    assert ("busiest expert, of a fair share, last 20 steps", "1.60") in metrics.summary(rows)
    (line, _) = figures.expert_load(metrics.select(rows, "step")).axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), 1.6)
    assert "<svg " in report.experts(metrics.select(rows, "step"))


def run_of(folder):
    """What a run measured, without what the clock says; and all that it saved last."""
    rows = metrics.read(folder)
    clock = ("seconds", "compiled")
    told = [{k: v for k, v in row.items() if k not in clock} for row in rows]
    saved = ocp.CheckpointManager(folder / "checkpoints").restore(
        6, args=ocp.args.Composite(state=ocp.args.StandardRestore())
    )["state"]
    return [row for row in told if row["event"] != "start"], saved


@pytest.mark.usefixtures("no_pictures")
def test_a_mixture_of_experts_resumes_bit_for_bit(flags, tmp_path):
    """Its biases are no parameters, and no optimizer keeps them: the checkpoint has to."""
    first, again = tmp_path / "first", tmp_path / "again"
    assert train.main(flags(first, experts=4, d_ff=15)) == 0
    shutil.copytree(first, again)
    shutil.rmtree(again / "checkpoints" / "6")
    assert train.main(["--resume", "--run-dir", str(again)]) == 0
    (rows, saved), (expected, state) = run_of(again), run_of(first)
    steps_of = metrics.select(rows, "step")
    assert [row["step"] for row in steps_of] == [1, 2, 3, 4, 5, 6]
    assert any(row["heads_clipped"] for row in steps_of[3:])  # by MuonClip, behind the restart
    assert rows == expected
    chex.assert_trees_all_equal(saved, state)
    biases = [x for path, x in jax.tree.leaves_with_path(saved) if "'bias'" in str(path)]
    assert biases and all(x.any() for x in biases)
