"""Writing: from a plan made of headers alone to a finished folder."""
