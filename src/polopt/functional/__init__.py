"""Pure tensor mathematics that several methods share."""
