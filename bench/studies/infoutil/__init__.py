"""InfoUtil's tables and figures."""
