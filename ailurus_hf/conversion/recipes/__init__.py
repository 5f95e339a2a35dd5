"""One file per source: signs of recognition, table of rules, config reader."""
