"""Text for the training programs: sources, vocabularies, batches, models from scratch, command lines."""
