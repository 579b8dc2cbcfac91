"""Sparse inputs, saved packed for the gradient of the weight (SWAT)."""
