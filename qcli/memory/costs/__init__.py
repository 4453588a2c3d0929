"""What each part of a model costs in bytes: weights, cache, activations, training, libraries."""
