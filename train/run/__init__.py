"""What the training programs share: command line, frame, loop, checkpoints, twins, results."""
