"""The checkpoints of one training: find, order, check and read them. Never imports a task."""
