"""Edges: recordings and probes in, results out."""
