"""Targets: one folder or file each, writer beside reader."""
