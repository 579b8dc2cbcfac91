"""The effective weight S(W) and its gradient: of one layer, of all layers in one launch, and as an op."""
