"""Tunix's own PeftTrainer with MuonClip on its Llama: 20 steps, clips, and a resumed run."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax.checkpoint import CheckpointManagerOptions

import muonclip_jax as mc
from tests.models.checks import require

require("tunix")
require("metrax")

from tunix.models.llama3 import model as llama3  # noqa: E402
from tunix.sft import hooks, peft_trainer  # noqa: E402

STEPS, SAVED = 20, 10
THRESHOLD = 0.05
TOKENS = np.arange(12).reshape(2, 6) % 11


class Losses(hooks.TrainingHooks):
    """What the trainer tells after each step."""

    def __init__(self):
        self.by_step = {}

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        self.by_step[train_step] = float(train_loss)

    def on_train_start(self, train_ctx): ...
    def on_train_end(self, train_ctx): ...
    def on_train_step_start(self, train_ctx): ...
    def on_eval_step_start(self, train_ctx): ...
    def on_eval_step_end(self, train_ctx, eval_loss): ...


def model_input(batch):
    length = batch.input_tokens.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": jnp.tile(jnp.arange(length), (len(batch.input_tokens), 1)),
        "attention_mask": jnp.tile(mask, (len(batch.input_tokens), 1, 1)),
    }


def train(folder, steps):
    """Losses by step, and the trainer. What a user adds to Tunix's lines ends in `# ours`."""
    config = llama3.ModelConfig(
        num_layers=2, embed_dim=16, hidden_dim=32, num_heads=4, num_kv_heads=2, head_dim=8,
        vocab_size=11, rope_theta=10_000, norm_eps=1e-6,
    )  # fmt: skip
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    mc.record_max_logits(model, softmax="b heads t s -> heads")  # ours
    layout = mc.find_layout(nnx.state(model, nnx.Param))
    trainer = peft_trainer.PeftTrainer(
        model,
        mc.muonclip(1e-2, layout=layout, threshold=THRESHOLD),  # ours
        peft_trainer.TrainingConfig(
            eval_every_n_steps=5,
            max_steps=steps,
            checkpoint_root_directory=folder and str(folder),
            checkpointing_options=CheckpointManagerOptions(save_interval_steps=SAVED),
        ),
    )
    mc.use_recorded_max_logits(trainer.optimizer)  # ours
    losses = Losses()
    trainer.with_gen_model_input_fn(model_input).with_training_hooks(losses)
    batch = peft_trainer.TrainingInput(input_tokens=TOKENS, input_mask=np.ones_like(TOKENS))
    trainer.train([batch] * STEPS, [batch])
    return losses.by_step, trainer


def test_trains_clips_and_resumes(tmp_path):
    straight, trainer = train(None, STEPS)
    state = mc.qk_clip_state(trainer.optimizer.opt_state)
    assert straight[STEPS] < straight[1] and int(state.heads_clipped) > 0
    assert int(state.nonfinite_heads) == 0, "the evaluations between steps are not recorded"
    maxima = np.stack(jax.tree.leaves(state.max_logits))
    assert maxima.shape == (2, 4) and len(np.unique(maxima)) > 1

    first, _ = train(tmp_path, SAVED)
    second, again = train(tmp_path, STEPS)
    assert first | second == straight and min(second) == SAVED + 1
    resumed = mc.qk_clip_state(again.optimizer.opt_state)
    jax.tree.map(np.testing.assert_array_equal, resumed, state)
