"""The arithmetic behind passes, and what several of them share."""
