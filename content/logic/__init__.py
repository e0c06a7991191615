"""content.logic."""
