"""The model family, self-contained: these files travel with every checkpoint and load without the package."""
