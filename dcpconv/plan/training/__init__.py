"""What a training checkpoint of any kind holds: weights, and optimizer state by name."""
