"""Fused convolutions: the effective weight is computed as the weight is loaded, and pruned blocks are skipped."""
