"""An estimate as people see it: bars, figure, JSON."""
