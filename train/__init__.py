"""Training programs for `accelerate launch -m tritonsparse.train.<program>`, their corpora and recipes."""
