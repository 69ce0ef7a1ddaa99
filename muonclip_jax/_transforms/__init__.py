"""Updates → updates: the links of the chain."""
