"""What a run is on disk: checkpoints, metrics, weights, how it ends."""
