"""Layers whose weights are places in a table, and a sparse matrix of a few kept apart."""
