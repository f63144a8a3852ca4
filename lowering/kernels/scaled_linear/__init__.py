"""Layers whose weights and activations are both codes."""
