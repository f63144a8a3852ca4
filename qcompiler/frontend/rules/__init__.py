"""Rules that take more than a function: attention in all its forms, experts, and what exporters write out."""
