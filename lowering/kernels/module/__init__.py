"""From a graph to a module whose layers are those operators."""
