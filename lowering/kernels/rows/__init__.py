"""What stands between the layers, row by row: quantizers, norms, gates, rotary embeddings."""
