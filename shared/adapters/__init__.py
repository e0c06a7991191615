"""shared.adapters."""
