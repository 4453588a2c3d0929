"""Text out of a loaded model: prompts, what the model's own files ask for, and the step of a token."""
