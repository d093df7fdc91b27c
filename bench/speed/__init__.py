"""Speed against peers and against the hardware's limit."""
