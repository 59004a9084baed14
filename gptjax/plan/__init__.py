"""Planning: what a run will need and take on hardware that is not here."""
