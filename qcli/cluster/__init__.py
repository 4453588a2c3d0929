"""Work divided over the machines of a Ray cluster: who works, on what, and what is done when one of them dies."""
