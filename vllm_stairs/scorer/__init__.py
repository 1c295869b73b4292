"""How the target reads the stairs: packed as one query, or expanded as one row per stair."""
