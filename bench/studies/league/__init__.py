"""Every method that stands, in one table."""
