"""Caches in codes: what is appended to them, and attention over them."""
