"""Training: the loss, the optimizer, the step, checkpoints, metrics and the loop that ties them."""
