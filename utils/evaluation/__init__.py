"""What experiments use: samples, features, metrics."""
