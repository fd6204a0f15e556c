"""What every domain runs on: micro-batches, ranks, checkpoints, tracking, seeding, diagnostics."""
