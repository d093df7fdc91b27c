"""Methods that choose crops of real images."""
