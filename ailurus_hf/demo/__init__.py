"""What shows the method without a download: drawn street scenes, and a small checkpoint trained on them."""
