"""A backtest's result as one page that a person can read."""
