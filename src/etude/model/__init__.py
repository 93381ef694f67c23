"""The model: loading its weights, putting adapters on it, and choosing the path that trains it."""
