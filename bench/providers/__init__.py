"""The implementations that are compared: plain PyTorch, its compiler, the peers, and lcconformer."""
