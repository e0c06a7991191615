"""content.adapters."""
