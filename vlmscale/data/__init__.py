"""Records, templates, images, the Grain pipeline and the built-in scenes; knows nothing of models."""
