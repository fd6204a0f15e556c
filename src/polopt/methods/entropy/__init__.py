"""Methods about keeping the policy's entropy."""
