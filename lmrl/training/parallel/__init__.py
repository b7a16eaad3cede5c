"""How weights, gradients and optimizer state are spread over processes."""
