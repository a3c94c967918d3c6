"""Recipes: one file each, `get_config(mode)`; see common.py for the keys."""
