"""shared.market.adapters."""
