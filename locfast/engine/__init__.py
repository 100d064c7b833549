"""Training runs: the loop, checkpoints and exact resume, ranks, logs. Knows no method by name."""
