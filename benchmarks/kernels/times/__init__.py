"""How long operators and steps take."""
