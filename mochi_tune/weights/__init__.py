"""Model weights in every layout: finds, checks, loads, downloads and uploads them."""
