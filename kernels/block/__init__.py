"""Where kept blocks are, and products that skip the others."""
