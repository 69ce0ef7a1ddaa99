"""Orthogonalization of many parameters on a mesh."""
