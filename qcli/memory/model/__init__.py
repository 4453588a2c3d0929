"""What a model is, from its config.json and safetensors headers alone: its parameters, layers and context."""
