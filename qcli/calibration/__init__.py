"""Calibration: texts pass the model block by block, and what they leave decides how its weights are rounded."""
