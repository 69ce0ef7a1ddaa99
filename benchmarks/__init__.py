"""What everything costs, measured; `python -m benchmarks.NAME --help`.

orthogonalize.py   mc.orthogonalize next to the iterations of Optax and PyTorch
optimizer_step.py  a whole step next to theirs, to run and to compile
attention.py       attention that tells its max logits, next to attention that does not
train_step.py      a train step of the example, with and without QuacK and QK-Clip
methods.py         which Method of orthogonalization is the fastest where
accumulate.py      micro-batches with mc.accumulate and with optax.MultiSteps
overhead.py        what QuacK and QK-Clip add to the optimizer, by the compiler's count
pod.py             the optimizer's step on TPU pods, by the compiler's count
coverage.py        which known models are read right without a rule and without a layout
budgets.py         what compiled programs may cost: FLOPs, bytes, temporaries, operations

timing.py, targets.py and pictures.py: turns and records, what is asked, pictures
known_models.py: what each parameter of these models is, by hand
peers.py: the work of Optax and PyTorch; compiled.py, hlo.py, tpu.py: what XLA compiles
records/: results, with date, device and versions; budgets.json is compared by the tests
"""
