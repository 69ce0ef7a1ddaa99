"""MaxText's own trainer with MuonClip: 20 steps, clips, and a run resumed from its checkpoint.

In processes of their own: the launcher sets attributes of MaxText's modules, as a user's does.
"""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.models.checks import require

require("xprof")  # their trainers import what their models do not
CONFIG = pathlib.Path(require("maxtext").origin).parent / "configs" / "base.yml"
ROOT = pathlib.Path(__file__).parents[2]
STEPS, SAVED = 20, 10
OPTIONS = dict(
    run_name="run",
    hardware="cpu",
    attention="dot_product",
    dataset_type="synthetic",
    enable_goodput_recording=False,
    skip_jax_distributed_system=True,
    enable_checkpointing=True,
    async_checkpointing=False,
    checkpoint_period=SAVED,
    save_checkpoint_on_completion=False,
    log_config=False,
    override_model_config=True,
    steps=STEPS,
    learning_rate=0.01,
    dtype="float32",
    weight_dtype="float32",
    per_device_batch_size=2,
    max_target_length=8,
    base_emb_dim=16,
    base_num_query_heads=4,
    base_mlp_dim=32,
    base_num_decoder_layers=3,
    head_dim=8,
    vocab_size=32,
)
GQA = dict(decoder_block="llama2", base_num_kv_heads=2)
MLA = dict(
    decoder_block="deepseek",
    attention_type="mla",
    base_num_kv_heads=4,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    rope_type="default",
    first_num_dense_layers=1,
    shared_experts=1,
    num_experts=2,
    num_experts_per_tok=1,
    base_moe_mlp_dim=8,
    sparse_matmul=False,
    capacity_factor=-1.0,
)


def run(folder: pathlib.Path, **options) -> tuple[dict[int, float], dict]:
    """Losses by step, and what the clip's state holds at the end."""
    metrics, seen = folder / "metrics.json", folder / "seen.json"
    metrics.unlink(missing_ok=True)
    given = OPTIONS | options | {"base_output_directory": folder, "metrics_file": metrics}
    arguments = [str(CONFIG), *(f"{key}={value}" for key, value in given.items())]
    module = [sys.executable, "-m", "tests.models.launch_maxtext", str(seen)]
    subprocess.run([*module, *arguments], cwd=ROOT, check=True)
    rows = map(json.loads, metrics.read_text().splitlines())
    losses = {int(row["step"]): row["learning/loss"] for row in rows}
    return losses, json.loads(seen.read_text())


# Half a minute each, so each choice once; the other two pairs passed when this was written.
@pytest.mark.parametrize(
    ("options", "scan_layers"), [(GQA, True), (MLA, False)], ids=["gqa-scanned", "mla-unscanned"]
)
def test_trains_clips_and_resumes(tmp_path, options, scan_layers):
    losses, seen = run(tmp_path, scan_layers=scan_layers, **options)
    assert list(losses) == list(range(STEPS)) and losses[STEPS - 1] < losses[0]
    maxima = np.concatenate([np.ravel(x) for x in seen["max_logits"]])
    assert maxima.shape == (3 * 4,), "three layers of four heads"
    assert np.isfinite(maxima).all() and len(set(maxima)) > 1
    assert seen["heads_clipped"] == [(maxima > 1).sum()] and seen["heads_clipped"] > [0]
    assert seen["nonfinite_heads"] == seen["lost_heads"] == [0]

    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        if int(checkpoint.name) > SAVED:
            shutil.rmtree(checkpoint)
    resumed, seen_again = run(tmp_path, scan_layers=scan_layers, **options)
    assert min(resumed) == SAVED + 1
    assert resumed == {step: loss for step, loss in losses.items() if step > SAVED}
    assert seen_again == seen
