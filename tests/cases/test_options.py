"""Every option is checked when a chain is built: a wrong one raises, and says what it may be.

One row for each wrong value of each option of each public function. The message names the option,
what was found and what it may be. (What `optax.inject_hyperparams` makes arrays of is checked
where it is concrete.)
"""

import inspect
import math

import jax.numpy as jnp
import optax
import pytest

import muonclip_jax as mc

LAYOUT = mc.layouts.mha()
KERNELS = {name: {"kernel": jnp.ones((8, 2, 4))} for name in ("query", "key", "value")}
PARAMS = {"attn": {**KERNELS, "out": {"kernel": jnp.ones((2, 4, 8))}}}
SOWN = {"attn": {"max_logits": jnp.ones(2)}}
STATE = mc.qk_clip(LAYOUT).init(PARAMS)
HEADS = jnp.ones((1, 3, 2, 4))
PIECES = LAYOUT.pieces
NAN = math.nan

# Wrong values by what the option should be, and the words that tell it.
NUMBER = [None, "0.5", [0.5], True]
NAME = [None, 3, ("a",)]
FLAG = ([None, "yes", 1.5, 1], ["True or False"])
COUNT = ["4", 1.5, 0, -1, True]
WHOLE = ["whole number", "at least 1"]
MAY_BE_NAME = ([3, ("a",)], ["text"])
TEXT = ([None, 3], ["text"])
MAY_BE_SEVERAL = ([3, (), ("a", 3)], ["text"])  # or a function, of which nothing can be told
FLOATS = (["int32", "foo", 3], ["bfloat16, float16, float32, float64"])
NUMBER_OR_SCHEDULE = (["1e-3", [1e-3], jnp.ones(2), -1.0, NAN, math.inf, True], ["number"])
RATE = ([None, *NUMBER_OR_SCHEDULE[0]], ["number"])
TRANSFORMATION = ([None, "adam", 3, optax.adam], ["Optax transformation"])
LAYOUT_WANTED = (["mha", mc.layouts.mha, 3, [], [LAYOUT, "mha"]], ["layouts.mha()"])
NEWTON_SCHULZ = ([None, "polar", mc.schedules.jordan()], ["NewtonSchulz"])
SCHEDULE = ([None, "jordan", mc.schedules.jordan], ["Schedule"])
METHOD = ([None, "foo", 3], ['"auto"', '"standard"', '"gram"'])
DIMENSION_NUMBERS = ([3, {"a": 3}, 0.5], ["pattern", "MuonDimensionNumbers", "None"])
MASK = ([True, "kernel", 1, {"a": 1}], ["True", "weight_decay_mask"])
FROZEN = ([3, 0.5, {"a": 3}, ("a", 3)], ["frozen", "True"])
DEVICES = ([0, "2", 1.5, {(8, 4): 0}, {8: 2}], WHOLE)
SHARDINGS = ([3, "data", {"a": 3}], ["NamedSharding", "PartitionSpec"])
GRANULARITY = (["all", ("q",), 3, None], ["Granularity"])
RULES = ([[("a", None)], "a/*", 3, {"a": 3}, {3: None}, {"a": ["in out", 3]}], ["pattern"])
UPDATE_RMS = (["arbitrary", None, 0.2], ['"match_adam"', '"jordan"', "function"])
MOMENTUM = ([*NUMBER, 1.5, 1.0, -0.1, NAN], ["[0, 1)"])
THRESHOLD = ([*NUMBER, 0.0, -1.0, NAN], ["above 0"])
ALPHA = ([*NUMBER, 1.5, -0.1, NAN], ["[0, 1]"])
SHARED_KEYS = ([None, "half", True, 3], ['"untouched"', '"split"'])
SCOPE = ([None, "model", 3], ['"head"', '"layer"'])
MODULE = ([None, "attn", 3], ["flax.linen.Module", "flax.nnx.Module"])
AXES = ([3, ["data"], ("data", 3)], ["name of an axis", "tuple"])

GENERATED = {
    "steps": ([None, *COUNT], WHOLE),
    "lower": ([None, "0.1", 0.0, 1.0, NAN], ["between 0 and 1"]),
    "safety": ([None, "1", 0.5, NAN, math.inf], ["finite", "at least 1"]),
    "normalization": ([None, "spectral"], ['"frobenius"', '"schatten4"', '"aol"']),
}
ROUTING = {
    "layout": LAYOUT_WANTED,
    "granularity": GRANULARITY,
    "rules": RULES,
    "dimension_numbers": DIMENSION_NUMBERS,
}
ON_A_MESH = {"shardings": SHARDINGS, "devices_per_matrix": DEVICES}
MUON = {"momentum": MOMENTUM, "nesterov": FLAG, "newton_schulz": NEWTON_SCHULZ, "mu_dtype": FLOATS}
DIRECTION = {
    "other": TRANSFORMATION, "update_rms": UPDATE_RMS, "frozen": FROZEN,
    **MUON, **ROUTING, **ON_A_MESH,
}  # fmt: skip
DECAY = {"weight_decay": RATE, "weight_decay_mask": MASK}
RECIPE = {"learning_rate": RATE, "other_learning_rate": NUMBER_OR_SCHEDULE, **DIRECTION, **DECAY}
CLIP = {
    "layout": LAYOUT_WANTED,
    "threshold": THRESHOLD,
    "scope": SCOPE,
    "axis_name": AXES,
    "heads_axis_name": AXES,
}
QK_CLIP = {**CLIP, "alpha": ALPHA, "shared_keys": SHARED_KEYS, "frozen": FROZEN}
QUACK = {
    "layout": LAYOUT_WANTED,
    "relative_learning_rate": ([*NUMBER, 0.0, -1.0, NAN, math.inf], ["above 0"]),
    "rule": ([None, "mla", 3], ['"paper"', '"latent_norm"']),
    "floor": ([*NUMBER, -1.0, NAN, math.inf], ["at least 0"]),
    "frozen": FROZEN,
}
SPECTRAL = {
    "limit": ([*NUMBER, 0.0, -1.0, NAN], ["above 0"]),
    "dimension_numbers": DIMENSION_NUMBERS,
}
ATTENTION = {
    "is_causal": FLAG,
    "local_window_size": (["3", 1.5, -1, (1, -1), (1, 2, 3), [1, 2]], ["int"]),
    "scale": (["0.5", [0.5], NAN, math.inf], ["number", "finite"]),
    "soft_cap": (["30", [30.0], 0.0, -1.0, NAN], ["number", "above 0"]),
    "chunk_size": (COUNT, ["int", "at least 1"]),
    "dtype": (["int32", "foo"], ["floating point"]),
}
DROPOUT = {
    "implementation": ([None, "flash", 3], ['"auto"', '"chunked"', '"tokamax"', '"logsumexp"']),
    "dropout_rate": ([None, "0.1", 1.0, -0.1, NAN], ["[0, 1)"]),
    "broadcast_dropout": FLAG,
}
TRANSPOSED = (["yes", 1, 1.5], FLAG[1])
PROJECTION = {
    "transposed": TRANSPOSED,
    "query": ([None, *MAY_BE_SEVERAL[0]], ["text"]),
    **dict.fromkeys(("key", "value", "out"), MAY_BE_SEVERAL),
}
SIZES = {
    "sizes": ([{"heads": 0}, {"heads": "4"}, {"heads": 1.5}, 3], ["whole number", "at least 1"])
}
SELECT = {"select": ([{"features": "a"}, {"features": (0, 1, 2)}, 3], ["(start, stop)"])}

_LENGTHS = [1.5, jnp.ones(3), jnp.ones((7, 5), int), True]
PACKED = {
    "segment_ids": ([1.5, jnp.ones((2, 3)), jnp.ones((7, 5), int), (1, 2, 3)], ["segment_ids"]),
    "query_seq_lengths": (_LENGTHS, ["query_seq_lengths"]),
    "key_value_seq_lengths": (_LENGTHS, ["key_value_seq_lengths"]),
}
SINKS = {"sinks": ([jnp.ones(2, int), jnp.ones(5), jnp.ones((2, 2))], ["sinks"])}

SQUARE = jnp.eye(2)
LINALG_LOWER = (["1e-3", [1e-3], 0.0, 1.0, NAN], ["between 0 and 1"])
MATRIX_ARRAYS = ([jnp.ones((2, 2), int), jnp.ones((2, 2), complex)], FLOATS[1])
OF_ROOT = {
    "x": MATRIX_ARRAYS,
    "by": ([None, "svd", 3, mc.NewtonSchulz()], ['"newton_schulz"', '"eigh"']),
    "lower": LINALG_LOWER,
}
OF_SIGN = {
    "x": MATRIX_ARRAYS,
    "by": ([None, "eigh", 3, mc.schedules.jordan()], ['"newton_schulz"', '"svd"', "NewtonSchulz"]),
    "lower": LINALG_LOWER,
}
BOUND = ([None, "1", [1.0], -1.0, NAN, math.inf], ["finite", "at least 0"])

SIDES = {"ins": ([None, *COUNT], WHOLE), "outs": ([None, *COUNT], WHOLE)}
OF_SHAPE = {"rule": UPDATE_RMS, **SIDES}
RATIO = ([None, "2", "x", 0.0, -1.0, NAN, math.inf, [1.0, 0.0]], ["finite", "above 0"])
POSITIVE = ([None, "2", [2.0], 0.0, -1.0, NAN, math.inf], ["finite", "above 0"])
BETA = ([None, "0.9", 1.0, -0.1, NAN], ["[0, 1)"])
KIND = ([None, "matrix", 3], ['"hidden"', '"embedding"', '"unembedding"', '"vector"'])
DEPTH_POWER = ([None, "1", 0.0, 2.0, NAN], ["[0.5, 1]"])
POWER = ([None, "1", [1.0], -1.0, NAN], ["at least 0"])
SIZE = mc.scaling.Size(64, 2, 512, 100)
TUNED = {"learning_rate": 0.02, "weight_decay": 0.1}
TOY = (lambda key: jnp.ones(2), lambda params: (params.sum(), {"x": params}))
MAY_BE_POSITIVE = (POSITIVE[0][1:], POSITIVE[1])


TWO_RATES = {"learning_rate": 1e-2, "other_learning_rate": 1e-3}


def _of(function, options):
    """Those of the options that a function has."""
    return {
        name: o for name, o in options.items() if name in inspect.signature(function).parameters
    }


# function: (it, what it needs, the options with their wrong values and the words that tell better)
FUNCTIONS = {
    "muon": (mc.muon, {"learning_rate": 1e-3}, RECIPE),
    "muonclip": (
        mc.muonclip,
        {"learning_rate": 1e-3, "layout": LAYOUT},
        {**RECIPE, **QK_CLIP},
    ),
    "kimi_muonclip": (
        mc.kimi_muonclip,
        {"learning_rate": 1e-3, "layout": LAYOUT},
        _of(mc.kimi_muonclip, RECIPE | CLIP),
    ),
    **{
        name: (recipe, needed, _of(recipe, RECIPE | {"b2": MOMENTUM}))
        for name, recipe, needed in (
            ("moonlight", mc.moonlight, {"learning_rate": 1e-3}),
            ("normuon", mc.normuon, {"learning_rate": 1e-3}),
            ("muonh", mc.muonh, TWO_RATES),
            ("nanochat", mc.nanochat, TWO_RATES),
        )
    },
    "quack": (
        mc.quack,
        {"learning_rate": 1e-3, "layout": LAYOUT},
        {
            "learning_rate": RATE,
            **QUACK,
            "direction": (["adam", 3, optax.adam], TRANSFORMATION[1]),
            **DECAY,
            "scale_weight_decay": (["yes", 1.5, 1], FLAG[1]),  # None is the rule's way
        },
    ),
    "muon_direction": (mc.muon_direction, {}, DIRECTION),
    "scale_by_muon": (
        mc.scale_by_muon,
        {},
        {**MUON, "bias_correction": FLAG, "dimension_numbers": DIMENSION_NUMBERS, **ON_A_MESH},
    ),
    "scale_by_orthogonalization": (
        mc.scale_by_orthogonalization,
        {},
        {"newton_schulz": NEWTON_SCHULZ, "dimension_numbers": DIMENSION_NUMBERS, **ON_A_MESH},
    ),
    "scale_by_periodic_orthogonalization": (
        mc.scale_by_periodic_orthogonalization,
        {"period": 5},
        {
            "period": ([None, *COUNT], WHOLE),
            "newton_schulz": NEWTON_SCHULZ,
            "blocks": ([3, (1,), [1, 2], (0, 1), (1, 1.5), "device"], WHOLE),
            "block_scale": ([*NUMBER, 0.0, -1.0, NAN, math.inf], ["above 0"]),
            "dimension_numbers": DIMENSION_NUMBERS,
            **ON_A_MESH,
        },
    ),
    "scale_by_update_rms": (
        mc.scale_by_update_rms,
        {},
        {"rule": UPDATE_RMS, "dimension_numbers": DIMENSION_NUMBERS},
    ),
    "normalize_rms": (
        mc.normalize_rms,
        {},
        {
            "rms": ([*NUMBER, 0.0, -1.0, NAN, math.inf], ["above 0"]),
            "of": ([None, 3, "rows"], ['"matrix"', '"outputs"']),
            "dimension_numbers": DIMENSION_NUMBERS,
            "shardings": SHARDINGS,
        },
    ),
    "scale_by_neuron_rms": (
        mc.scale_by_neuron_rms,
        {},
        {
            "b2": MOMENTUM,
            "eps": ([*NUMBER, -1.0, NAN, math.inf], ["at least 0"]),
            "of": ([None, 3, "matrix"], ['"outputs"', '"longer"']),
            "keep_rms": FLAG,
            "dimension_numbers": DIMENSION_NUMBERS,
            "shardings": SHARDINGS,
        },
    ),
    "partition_matrices": (
        mc.partition_matrices,
        {
            "links": lambda numbers: mc.scale_by_muon(dimension_numbers=numbers),
            "other": optax.scale_by_adam(),
        },
        {
            "links": ([None, 3, optax.scale_by_adam()], ["function"]),
            "other": TRANSFORMATION,
            **ROUTING,
            "frozen": FROZEN,
        },
    ),
    "add_decayed_weights": (
        mc.add_decayed_weights,
        {"weight_decay": 0.1},
        {**DECAY, "cautious": FLAG, **ROUTING, "frozen": FROZEN},
    ),
    "scale_by_quack": (mc.scale_by_quack, {"layout": LAYOUT}, QUACK),
    "qk_clip": (mc.qk_clip, {"layout": LAYOUT}, QK_CLIP),
    "measure_max_output": (
        mc.measure_max_output,
        {"attended": jnp.ones((3, 2, 4)), "kernel": jnp.ones((2, 4, 6))},
        {
            "attended": ([jnp.ones((3, 2, 4), int), jnp.ones((2, 4))], ["attended"]),
            "kernel": ([jnp.ones((2, 4, 6), int), jnp.ones((4, 2, 6))], ["kernel"]),
            "dtype": ATTENTION["dtype"],
        },
    ),
    "apply_qk_clip": (
        mc.apply_qk_clip,
        {"params": PARAMS, "max_logits": SOWN, "layout": LAYOUT},
        QK_CLIP,
    ),
    "clip_by_signal": (
        mc.clip_by_signal,
        {"layout": LAYOUT, "threshold": 1.0, "signal": "s", "factors": lambda block, gamma: {}},
        {
            **CLIP,
            "frozen": FROZEN,
            "signal": ([None, 3, "not a name"], ["name"]),
            "factors": ([None, {"o": 1}], ["function"]),
        },
    ),
    "max_output_clip": (
        mc.max_output_clip,
        {"layout": LAYOUT, "threshold": 1.0},
        {**CLIP, "frozen": FROZEN, "signal": ([None, 3, "not a name"], ["name"])},
    ),
    "clip_singular_values": (
        mc.clip_singular_values,
        {"limit": 1.0},
        {**SPECTRAL, "newton_schulz": NEWTON_SCHULZ, **ON_A_MESH},
    ),
    "cap_spectral_norm": (
        mc.cap_spectral_norm,
        {"limit": 1.0},
        {**SPECTRAL, "iterations": (COUNT, WHOLE), "shardings": SHARDINGS},
    ),
    "decay_spectral_norm": (
        mc.decay_spectral_norm,
        {"rate": 0.1},
        {
            "rate": RATE,
            "dimension_numbers": DIMENSION_NUMBERS,
            "iterations": (COUNT, WHOLE),
            "shardings": SHARDINGS,
        },
    ),
    "hyperball": (
        mc.hyperball,
        {"learning_rate": 0.1},
        {
            "learning_rate": RATE,
            "dimension_numbers": DIMENSION_NUMBERS,
            "shardings": SHARDINGS,
        },
    ),
    "accumulate": (
        mc.accumulate,
        {"tx": optax.sgd(0.1), "every": 2},
        {
            "tx": TRANSFORMATION,
            "every": ([None, "4", 1.5, 0, -1, True], ["micro-batches"]),
            "accumulator_dtype": (["int32", "foo"], ["floating point"]),
        },
    ),
    "describe": (
        mc.describe,
        {"params": PARAMS},
        {
            **ROUTING,
            **ON_A_MESH,
            "weight_decay_mask": MASK,
            "newton_schulz": NEWTON_SCHULZ,
            "frozen": FROZEN,
        },
    ),
    "muon_dimension_numbers": (
        mc.muon_dimension_numbers,
        {"params": PARAMS},
        {name: ROUTING[name] for name in ("layout", "granularity", "rules")},
    ),
    "Granularity": (
        mc.Granularity,
        {},
        {
            "heads": ([0, 1.5, "whole", None, True, {"q": 0}, {"x": 2}, {"k_rope": 2}], ["heads"]),
            "together": ([("q", "k"), 3, None, "whole", (("q", "x"),), (("q",),)], ["together"]),
        },
    ),
    "NewtonSchulz": (
        mc.NewtonSchulz,
        {},
        {
            "schedule": SCHEDULE,
            "dtype": FLOATS,
            "method": METHOD,
            "rates": ([3, (165, 291), {"bfloat16": 165}], ["Rates"]),
        },
    ),
    "Rates": (
        mc.Rates,
        {"bfloat16": 165, "float32": 291},
        {
            name: ([*NUMBER, 0, -1.0, NAN, math.inf], ["above 0"])
            for name in ("bfloat16", "float32")
        },
    ),
    "measured_rates": (mc.measured_rates, {}, {"n": (COUNT, WHOLE), "repeats": (COUNT, WHOLE)}),
    "orthogonalize": (
        mc.orthogonalize,
        {"x": jnp.ones((2, 3))},
        {
            "schedule": SCHEDULE,
            "dtype": FLOATS,
            "method": METHOD,
            "x": ([jnp.ones((2, 2), int), jnp.ones((2, 2), complex)], FLOATS[1]),
        },
    ),
    "Method": (
        mc.Method,
        {"iteration": "gram"},
        {
            "iteration": ([None, "foo", 3], ['"standard"', '"gram"']),
            "smallest_block": (COUNT, WHOLE),
            "row_major": FLAG,
            "kernel": ([None, "triton", 3], ['"xla"', '"pallas"']),
            "chunk_entries": ([None, *COUNT], WHOLE),
            "lean": FLAG,
        },
    ),
    "Schedule": (
        mc.Schedule,
        {"name": "mine", "coefficients": ((2.0, -1.5, 0.5),) * 3},
        {
            "name": TEXT,
            "coefficients": ([None, "abc", (), ((1.0, 2.0),), 3], ["(a, b, c)"]),
            "norm_factor": ([None, "1", 0.5, NAN, math.inf], ["finite", "at least 1"]),
            "lower": ([None, "0.1", 0.0, 1.0, NAN], ["between 0 and 1"]),
            "normalization": ([None, "spectral", 3], ['"frobenius"', '"schatten4"', '"aol"']),
            "source": TEXT,
        },
    ),
    "jordan": (mc.schedules.jordan, {}, {"steps": ([None, *COUNT], WHOLE)}),
    "polar_express": (mc.schedules.polar_express, {}, GENERATED),
    "cubic": (mc.schedules.cubic, {}, GENERATED),
    "cans": (mc.schedules.cans, {}, {"safety": ([None, "1", 0.5, NAN], ["at least 1"])}),
    "mha": (mc.layouts.mha, {}, {"heads": (COUNT, WHOLE), **PROJECTION, "block": MAY_BE_SEVERAL}),
    "gqa": (
        mc.layouts.gqa,
        {},
        {
            "kv_heads": (COUNT, WHOLE),
            "heads": (COUNT, WHOLE),
            **PROJECTION,
            "block": MAY_BE_SEVERAL,
        },
    ),
    "mla": (
        mc.layouts.mla,
        {"nope": 4, "rope": 2, "v": 4},
        {
            **dict.fromkeys(("nope", "v"), ([None, *COUNT], WHOLE)),
            "rope": ([None, "4", 1.5, -1, True], ["whole number", "at least 0"]),  # 0 is NoPE
            "heads": (COUNT, WHOLE),
            "query": ([None, 3, ("a", 3), ("a", "b", "c")], ["text"]),
            "transposed": TRANSPOSED,
            "key_value": ([None, 3, "wkv", ("a", 3)], ["text"]),
            **dict.fromkeys(("out", "query_norm", "key_value_norm"), MAY_BE_NAME),
            "block": MAY_BE_SEVERAL,
        },
    ),
    "fused_qkv": (
        mc.layouts.fused_qkv,
        {"heads": 4},
        {
            "heads": ([None, *COUNT], WHOLE),
            "kv_heads": (COUNT, WHOLE),
            "kernel": TEXT,
            "axes": ([3, "in features"], ["'part'", "'heads'"]),
            "out": MAY_BE_NAME,
            "block": MAY_BE_SEVERAL,
        },
    ),
    "linear_attention": (
        mc.layouts.linear_attention,
        {"heads": 4},
        {
            **dict.fromkeys(("heads", "value_heads"), (COUNT, WHOLE)),
            **dict.fromkeys(("query", "key", "value"), TEXT),
            **dict.fromkeys(("gate", "out"), ([3], ["text"])),
            "block": MAY_BE_SEVERAL,
        },
    ),
    "ignore": (mc.layouts.ignore, {}, {"block": ([None, *MAY_BE_SEVERAL[0]], ["text"])}),
    "Layout": (
        mc.Layout,
        {"name": "mine", "pieces": PIECES},
        {
            "name": TEXT,
            "pieces": ([None, "q", ("q",), PIECES[0], ()], ["Piece"]),
            "shared_keys": FLAG,
            "harmless": (["v_norm", (3,), 3, None], ["tuple", "text"]),
            "block": MAY_BE_SEVERAL,
            "stack_axis": ([None, "0", 0.5, -1, True], ["whole number", "at least 0"]),
            "softmax": FLAG,
        },
    ),
    "Piece": (
        mc.layouts.Piece,
        {"role": "q", "parameter": "query"},
        {
            "role": ([None, "query", 3], ["q_nope", "kv_down"]),
            "parameter": TEXT,
            "axes": ([3, ("in", "features")], ["text"]),
            **SIZES,
            **SELECT,
            "bias": MAY_BE_NAME,
        },
    ),
    "MatrixPattern": (
        mc.MatrixPattern,
        {"pattern": "heads in features"},
        {"pattern": TEXT, **SIZES, **SELECT},
    ),
    "dot_product_attention": (
        mc.dot_product_attention,
        dict.fromkeys(("query", "key", "value"), HEADS),
        {**ATTENTION, **PACKED, **SINKS, **DROPOUT},
    ),
    "attention_fn": (
        mc.attention_fn,
        dict.fromkeys(("query", "key", "value"), HEADS),
        {
            **ATTENTION,
            **PACKED,
            **SINKS,
            **DROPOUT,
            "module": (["attn", 3], MODULE[1]),
        },
    ),
    "measure_max_logits": (
        mc.measure_max_logits,
        {"query": HEADS, "key": HEADS, "step": 0},
        {
            **{name: wrong for name, wrong in ATTENTION.items() if name != "soft_cap"},
            **PACKED,
            "examples": (COUNT, ["int", "at least 1"]),
            "every": ([None, *COUNT], ["int", "at least 1"]),
            "step": (["3", 1.5, jnp.ones(2, int)], ["integer scalar"]),
            "which": ([None, "largest", 3], ['"highest"', '"lowest"', '"size"']),
        },
    ),
    "max_logits_bound": (
        mc.max_logits_bound,
        {"logsumexp": jnp.ones((3, 2))},
        {"heads_axis": ([None, "1", 0.5, 2, -3], ["axis"]), "logsumexp": ([1], ["floating"])},
    ),
    "max_logits_from_residuals": (
        mc.max_logits_from_residuals,
        {"row_max": jnp.ones((2, 3)), "row_sum": jnp.ones((2, 3))},
        {"heads_axis": ([None, "1", 0.5, 2, -3], ["axis"]), "row_sum": ([1], ["floating"])},
    ),
    "sow_max_logits": (
        mc.sow_max_logits,
        {"module": None, "max_logits": jnp.ones(2)},
        {"module": MODULE},
    ),
    "read_max_logits": (
        mc.read_max_logits,
        {},
        {"intermediates": (["attn", 3, jnp.ones(2)], ["intermediates", "mapping"])},
    ),
    "attention_report": (
        mc.attention_report,
        {"params": PARAMS, "opt_state": STATE, "intermediates": SOWN, "layout": LAYOUT},
        {"layout": LAYOUT_WANTED, "threshold": THRESHOLD, "frozen": FROZEN},
    ),
    "head_matrices": (
        mc.head_matrices,
        {"tree": PARAMS, "layout": LAYOUT},
        {"layout": LAYOUT_WANTED},
    ),
    "find_blocks": (
        mc.layouts.find_blocks,
        {"params": PARAMS, "layout": LAYOUT},
        {"layout": LAYOUT_WANTED},
    ),
    "effective_rank": (
        mc.effective_rank,
        {"x": jnp.ones((2, 3))},
        {"gamma": ([*NUMBER, 0.0, -1.0, NAN], ["above 0"])},
    ),
    "msign": (mc.linalg.msign, {"x": SQUARE}, OF_SIGN),
    "mclip": (
        mc.linalg.mclip,
        {"x": SQUARE},
        {
            **OF_SIGN,
            "low": ([*BOUND[0], 2.0], ["low"]),  # above `high`
            "high": BOUND,
            "form": ([None, "both", 3], ['"polar"', '"nested"', '"squared"']),
        },
    ),
    "matrix_sqrt": (mc.linalg.matrix_sqrt, {"x": SQUARE}, OF_ROOT),
    "inverse_sqrt": (mc.linalg.inverse_sqrt, {"x": SQUARE}, OF_ROOT),
    "inverse_root": (
        mc.linalg.inverse_root,
        {"x": SQUARE, "p": 3},
        {**OF_ROOT, "p": (COUNT, WHOLE)},
    ),
    "mcsgn": (
        mc.linalg.mcsgn,
        {"x": SQUARE},
        {"x": MATRIX_ARRAYS, "by": ([None, "svd", 3], ['"newton"', '"newton_schulz"'])},
    ),
    "solve_sylvester": (
        mc.linalg.solve_sylvester,
        {"a": SQUARE, "b": SQUARE, "c": SQUARE},
        {
            **dict.fromkeys("ab", ([jnp.ones((2, 2), int), jnp.ones((2, 3)), jnp.eye(3)], [])),
            "c": ([jnp.ones((2, 3)), jnp.ones((2, 2), jnp.bfloat16)], []),
            "symmetric": FLAG,
        },
    ),
    "coordinate_check": (
        mc.coordinate_check,
        {"model": lambda width: TOY, "optimizer": lambda w: optax.sgd(0.1), "widths": (2, 4)},
        {
            "model": ([None, 3], ["function of a width"]),
            "optimizer": ([None, optax.sgd(0.1)], ["function of a width"]),
            "widths": ([None, 64, (64,), "64", (64, 32), (64, 64), (64, 1.5), (0, 4)], []),
            "steps": (COUNT, WHOLE),
            "seeds": (COUNT, WHOLE),
            "tolerance": POSITIVE,
        },
    ),
    "shape_scale": (mc.scaling.shape_scale, {"rule": "none", "ins": 4, "outs": 8}, OF_SHAPE),
    "muon_update_rms": (
        mc.scaling.muon_update_rms,
        {"rule": "none", "ins": 4, "outs": 8},
        OF_SHAPE,
    ),
    "adam_update_rms": (
        mc.scaling.adam_update_rms,
        {},
        {"b1": BETA, "signal": ([None, "1", -1.0, NAN, math.inf], BOUND[1])},
    ),
    "match_rate": (
        mc.scaling.match_rate,
        {"adam_rate": 1e-3, "rule": "none", "ins": 4, "outs": 8},
        {**OF_SHAPE, "adam_rate": RATIO, "rms": RATIO},
    ),
    "muon_by_width": (
        mc.scaling.muon_by_width,
        {"rule": "none", "small": (4, 8), "large": (8, 16)},
        {
            "rule": UPDATE_RMS,
            **dict.fromkeys(("small", "large"), ([None, 3, (4,), [4, 8]], ["(in, out)"])),
        },
    ),
    "adam_by_width": (
        mc.scaling.adam_by_width,
        {"kind": "hidden", "ratio": 2.0},
        {"kind": KIND, "ratio": RATIO},
    ),
    "init_by_width": (
        mc.scaling.init_by_width,
        {"kind": "hidden", "ratio": 2.0},
        {"kind": KIND, "ratio": RATIO},
    ),
    "residual_by_depth": (
        mc.scaling.residual_by_depth,
        {"ratio": 2.0},
        {"ratio": RATIO, "power": DEPTH_POWER},
    ),
    "rate_by_depth": (
        mc.scaling.rate_by_depth,
        {"ratio": 2.0},
        {"ratio": RATIO, "power": DEPTH_POWER},
    ),
    "rate_by_batch": (
        mc.scaling.rate_by_batch,
        {"small": 32, "large": 64},
        {
            "small": RATIO,
            "large": RATIO,
            "power": ([None, "1", -0.5, 1.5, NAN], ["[0, 1]"]),
            "critical": (RATIO[0][1:], RATIO[1]),
        },
    ),
    "beta_by_batch": (
        mc.scaling.beta_by_batch,
        {"beta": 0.95, "ratio": 2.0},
        {"beta": BETA, "ratio": RATIO},
    ),
    "rate_by_length": (
        mc.scaling.rate_by_length,
        {"ratio": 2.0},
        {"ratio": RATIO, "power": POWER},
    ),
    "decay_product": (
        mc.scaling.decay_product,
        {},
        dict.fromkeys(("width", "batch", "length"), RATIO),
    ),
    "Size": (
        mc.scaling.Size,
        {"width": 64, "depth": 2, "batch": 512, "steps": 100},
        dict.fromkeys(("width", "depth", "batch", "steps"), ([None, *COUNT], WHOLE)),
    ),
    "Tuned": (
        mc.scaling.Tuned,
        TUNED,
        {
            **dict.fromkeys(("learning_rate", "logit_multiplier", "residual_multiplier"), POSITIVE),
            **dict.fromkeys(("other_learning_rate", "init_std"), MAY_BE_POSITIVE),
            "weight_decay": BOUND,
            **dict.fromkeys(("b1", "b2"), (BETA[0][1:], BETA[1])),
        },
    ),
    "transfer": (
        mc.scaling.transfer,
        {"tuned": mc.scaling.Tuned(**TUNED), "small": SIZE, "large": SIZE},
        {
            "tuned": ([None, 3, TUNED], ["Tuned"]),
            **dict.fromkeys(("small", "large"), ([None, 64, (64, 2)], ["Size"])),
            "update_rms": (["arbitrary", None, math.hypot], ['"match_adam"', '"jordan"']),
            "decay": ([None, "linear", 3], ['"width"', '"length"', '"fixed"']),
            "depth_power": DEPTH_POWER,
            "critical_batch": MAY_BE_POSITIVE,
            "length_power": POWER,
        },
    ),
    "inverse_low_rank_triangular": (
        mc.linalg.inverse_low_rank_triangular,
        {"diagonal": jnp.ones(3), "q": jnp.ones((3, 1)), "k": jnp.ones((3, 1))},
        {
            "diagonal": ([jnp.ones(2), jnp.ones(3, jnp.bfloat16)], []),
            **dict.fromkeys(
                "qk", ([jnp.ones((2, 1)), jnp.ones((3, 2)), jnp.ones((3, 1), int)], [])
            ),
        },
    ),
}


def shown(value):
    """For a test's name, which must be the same in every process: without addresses."""
    return getattr(value, "__name__", f"{value!r:.40}")


ROWS = [
    pytest.param(
        fn, {**needed, option: value}, option, words, id=f"{name}({option}={shown(value)})"
    )
    for name, (fn, needed, options) in FUNCTIONS.items()
    for option, (values, words) in options.items()
    for value in values
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("fn", "arguments", "option", "words"), ROWS)
def test_a_wrong_option_raises(fn, arguments, option, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        fn(**arguments)
    message, value = str(caught.value), arguments[option]
    for word in (option, *words):
        assert word in message, f"{word!r} is not in: {message}"
    if isinstance(value, str | float | None):
        found = repr(value), str(value), f"found {type(value).__name__}"
        assert any(text in message for text in found), f"{value!r} is not in: {message}"


@pytest.mark.parametrize(("fn", "needed"), [row[:2] for row in FUNCTIONS.values()], ids=FUNCTIONS)
def test_the_right_options_raise_nothing(fn, needed):
    """What the wrong rows are made of."""
    if fn not in (mc.sow_max_logits, mc.read_max_logits, mc.layouts.ignore):
        fn(**needed)


# What has no rows here, and why.
WITHOUT_OPTIONS = {
    *(
        "AccumulateState",
        "AttentionReport",
        "ClipState",
        "CoordinateCheck",
        "HeadReport",
        "QKClipState",
        "QuackState",
    ),
    *("ClipReport", "SignalReport", "ScheduledClipState", "SpectralNormState"),
    "NeuronRMSState",
    "declared_rates",
    *("HyperballState", "PeriodicOrthogonalizationState"),
    *("accumulate_state", "qk_clip_state", "quack_state"),  # take any state, test_errors.py
    "clip_report",  # the same, test_output_clip.py
    *("participation_ratio", "eigenvalue_participation_ratio", "nuclear_rank", "stable_rank"),
    *("singular_values", "spectral_norm", "orthogonality_error"),  # take a matrix alone
    *("aol", "deepseek_v4", "you"),
    *("read_signal", "read_activations", "sow_signal", "sow_activations"),  # as those of max_logits
    *("find_layout", "upgrade_state"),  # take trees
    *("Block", "Part", "LayoutProof"),  # are made by find_blocks and check_layout
    *("from_optax_muon", "from_torch_muon"),  # take states, test_elsewhere.py
    *("MaxLogits", "TrainState", "record_max_logits", "use_recorded_max_logits"),  # tests/trainers
    "use_in_maxtext",  # changes MaxText, tests/models
    "check_layout",  # takes a model, and has tests of what is wrong with one
}
# What a function is applied to, and what Flax's modules give.
NO_OPTIONS = {
    *("params", "max_logits", "tree", "query", "key", "value", "bias", "mask", "x", "logsumexp"),
    *("row_max", "row_sum", "intermediates", "opt_state", "deterministic", "dropout_rng"),
    "precision",  # JAX's own message
}


def public_functions():
    for module in (mc, mc.layouts, mc.schedules, mc.linalg, mc.scaling):
        for name in module.__all__:
            if callable(fn := getattr(module, name)) and not hasattr(fn, "__origin__"):
                yield name, fn


def test_the_table_covers_what_is_public():
    """A new public function, or option, needs rows, or a reason above."""
    covered = {*FUNCTIONS, *WITHOUT_OPTIONS}
    assert {name for name, _ in public_functions()} - covered == set()
    for name, (fn, needed, options) in FUNCTIONS.items():
        missing = inspect.signature(fn).parameters.keys() - options.keys() - NO_OPTIONS
        assert not missing, f"{name}: {sorted(missing)}"
        assert needed.keys() <= inspect.signature(fn).parameters.keys()
