"""A checkpoint into a transformers model that runs, and what to say where it has no room."""
