"""A multi-head latent attention language model, trained with MuonClip on real text.

settings.py    the flags
config.py      flags from a file
data.py        files → tokenizer → batches of tokens
model.py       the decoder; training form and absorbed decode form
experts.py     the decoder's mixture of experts: tokens through those they were sent to
devices.py     what a run runs on: simulated devices, a mesh, several processes
mesh.py        the mesh: batches, activations and results on it
partition.py   the mesh: which axis of which parameter goes where
steps.py       what runs on the devices: optimizer, training step, validation
train.py       the run: `python -m examples.mla.train`
checkpoint.py  checkpoints; stopping on a signal
folder.py      the run's folder: its name, its lock, files written whole
recorder.py    progress bar and metrics, one step late
watch.py       the metrics for TensorBoard and W&B
metrics.py     metrics.jsonl, and what is computed from it
figures.py     pictures of the metrics
svg.py         pictures for light and dark screens
page.py        tables and pictures as HTML
comparison.py  two runs, with and without the clip
report.py      report.html of a run
trained.py     a model from its run's folder
sample.py      text from it: `python -m examples.mla.sample`
evaluate.py    its loss on other text: `python -m examples.mla.evaluate`
compare.py     two optimizers on the same run: `python -m examples.mla.compare`
cli.py         flags from dataclasses, errors in one line
"""
