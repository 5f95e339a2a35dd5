"""What every part needs and none owns: files, errors, logging."""
