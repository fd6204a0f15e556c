"""Methods about how the importance ratio is held."""
