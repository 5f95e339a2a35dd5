"""The pieces `ailurus_hf.demo.scenes` draws a street from."""
