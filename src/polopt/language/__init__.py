"""The language domain: tasks, verifiers, sampling and the actor for token policies."""
