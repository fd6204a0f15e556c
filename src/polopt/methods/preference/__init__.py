"""Methods that learn from comparisons, labels and demonstrations."""
