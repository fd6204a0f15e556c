"""Methods about which prompts, rollouts and decisions are worth the work."""
