"""The methods that the paper compares MAIPG with. MAPPO is the scripts' own nu = 0."""
