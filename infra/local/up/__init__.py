"""What `troop up` does: the settings of the embedded cloud, and the processes."""
