"""How much memory a model needs, from its config.json and safetensors headers alone."""
