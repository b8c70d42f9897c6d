"""The small bundled bases and the scripts that made them."""
