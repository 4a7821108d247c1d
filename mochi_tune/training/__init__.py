"""What a training run needs besides the model: optimizer, checkpoints, metrics, random numbers."""
