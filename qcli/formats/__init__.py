"""On-disk formats. One format is one file here; a format names tensors, a method fills them."""
