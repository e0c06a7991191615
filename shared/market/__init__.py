"""shared.market."""
