"""What a model predicts on text, and what another form of it predicts instead: perplexity, divergence, speed."""
