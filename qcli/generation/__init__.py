"""Generates text from a loaded model: prompts, sampling, and the step that makes one token."""
