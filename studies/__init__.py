"""What the sources claim, tested: `python -m studies.NAME --size smoke|cpu|gpu`.

abilities QK-norm's better loss is paid for elsewhere; partial QK-norm ruins long contexts
clip      QK-Clip keeps logits at a threshold, at no loss; per head, not all heads alike
decay     logits grow linearly or faster; decay helps and costs loss; later they fall
family    the links that others put around Muon's lower its loss, or save it tokens
finetune  fine-tuning with another optimizer than the pretraining's costs, by the ranks
mla_norm  QK-norm in MLA ends at a lower loss than QK-Clip
rank      QK-norm makes the keys of models trained with Muon collapse
spectrum  Muon's updates have full rank, and so make singular values grow
transfer  scaled by muP's rule, or on a sphere, Muon has one best learning rate at every width
quack     QuacK is as stable as QK-norm, at any learning rate and with MLA

In each: __main__.py (the grid, and what is measured), report.py (tables and pictures from the
records), README.md (setting, claims, results, verdict), results/SIZE.jsonl (records, a run a line)
and results/SIZE/ (pictures). common/ is what they share.
"""
