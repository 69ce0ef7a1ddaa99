"""Attention layouts: which piece of which parameter is the query, key, ... of which head.

A layout is a declaration; `find_blocks` finds the attention blocks that fit it and checks every
shape. Per-head Muon, QuacK, QK-Clip and `describe` read nothing else about a model.
"""
