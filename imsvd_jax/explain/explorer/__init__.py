"""The explorer: a folder of static files about what an encoder learned."""
