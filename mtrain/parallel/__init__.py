"""Tasks on ranks: who owns what."""
