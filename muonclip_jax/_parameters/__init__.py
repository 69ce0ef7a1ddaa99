"""Which parameters Muon takes, and as which matrices."""
