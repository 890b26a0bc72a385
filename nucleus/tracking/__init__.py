"""Where a run's numbers are sent while it trains."""
