"""What operators look at: metrics, debug routes, the page at `/` and its live feed."""
