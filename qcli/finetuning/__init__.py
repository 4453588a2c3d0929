"""Training low-rank adapters on a frozen model: LoRA (arXiv:2106.09685) and QLoRA (arXiv:2305.14314)."""
