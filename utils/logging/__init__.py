"""What a run tells people: log, metrics, images, visdom."""
