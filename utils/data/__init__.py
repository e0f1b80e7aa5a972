"""Images and ids: datasets, pixels, batches, cached latents."""
