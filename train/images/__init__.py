"""Images for the training programs: batches, augmentation, models from scratch, schedules, command line."""
