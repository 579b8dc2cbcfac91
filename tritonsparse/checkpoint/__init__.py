"""What a run is saved as: the Sparsifier's state, ordinary checkpoints with their sidecar, and packed blocks."""
