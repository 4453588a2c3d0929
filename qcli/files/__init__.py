"""Files that are there whole or not at all, figures, and JSON that others wrote."""
