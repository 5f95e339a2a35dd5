"""The pieces `ailurus_hf.scenes` draws a street from."""
