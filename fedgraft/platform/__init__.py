"""One run from start to finish: configuration, rounds, evaluation, checkpoints, tracking, the report."""
