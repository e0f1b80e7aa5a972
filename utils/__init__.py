"""Everything that touches the world: data, files, logging, visdom, training helpers."""
