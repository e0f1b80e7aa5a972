"""Stage one: images to grids of ids and back."""
