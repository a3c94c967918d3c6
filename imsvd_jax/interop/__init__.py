"""Trained encoders for other programs: export, import, embeddings."""
