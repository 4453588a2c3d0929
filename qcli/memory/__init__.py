"""How much memory a model needs, told from its config.json and safetensors headers alone."""
