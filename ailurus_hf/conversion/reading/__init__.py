"""Reading other people's files without running anything in them."""
