"""Find, order, check and read the checkpoints of one training run. Never import a task."""
