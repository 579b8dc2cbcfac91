"""Linear products with the effective weight inside, and the op behind every sparse linear layer."""
