"""signals.adapters."""
