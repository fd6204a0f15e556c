"""Methods about how much better than expected a trajectory was."""
