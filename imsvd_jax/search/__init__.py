"""Finds images by meaning: alike, repeated, rare, and chosen by codes."""
