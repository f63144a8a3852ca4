"""Layers of 2 to 8-bit weights and float activations."""
