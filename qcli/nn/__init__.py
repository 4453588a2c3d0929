"""Modules that hold a quantized weight in its stored layout. One kind of module is one file here."""
