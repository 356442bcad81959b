"""What a stage needs and how long its steps take on a cluster, from the configuration alone; and the best layout."""
