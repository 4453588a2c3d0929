"""Files that are written completely or not at all, figures, and JSON from other tools."""
