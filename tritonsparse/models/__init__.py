"""Models that transformers no longer has; importing one registers it with the Auto classes."""
