"""Model weights in every layout: found, checked by their headers, loaded, and downloaded."""
