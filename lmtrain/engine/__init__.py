"""What makes the probability grow: one process in plain torch, or many with DeepSpeed ZeRO."""
