"""What a model predicts on text, and what another model or a quantized one predicts instead: perplexity, divergence, speed."""
