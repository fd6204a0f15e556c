"""Gymnasium environments: policies over actions, collectors, tasks."""
