"""Choosing masks: exact counts, units of a pattern, shares of layers, and the masks of embedding tables."""
