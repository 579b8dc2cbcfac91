"""Exact selection: the largest of all weights, n of every m, transposable masks."""
