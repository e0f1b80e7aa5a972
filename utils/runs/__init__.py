"""A run on the disk: its folder, files that are whole or absent, how scripts start and resume."""
