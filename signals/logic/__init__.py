"""signals.logic."""
