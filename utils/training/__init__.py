"""What both training scripts use: loop, precision, EMA, optimisers, checkpoints, processes."""
