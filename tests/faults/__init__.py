"""A cluster that is being broken, workers on it, and the judge of what came of it."""
