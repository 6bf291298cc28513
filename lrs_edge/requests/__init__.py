"""Requests: the queue in front of an engine, tickets, cancellation, budgets."""
