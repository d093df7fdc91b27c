"""Studies: one paper a room, on shared arms, grid, page and charts."""
