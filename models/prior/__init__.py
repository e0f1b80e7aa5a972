"""Stage two: the priors over grids of ids."""
