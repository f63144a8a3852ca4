"""Operators against their references."""
