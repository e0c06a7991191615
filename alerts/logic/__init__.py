"""alerts.logic."""
