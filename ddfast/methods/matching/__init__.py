"""Methods that optimise pixels until networks see in them what they see in real images."""
