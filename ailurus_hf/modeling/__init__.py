"""Models, and the operations under them. This folder travels to the Hub, see `ailurus_hf.hub.save_with_code`."""
