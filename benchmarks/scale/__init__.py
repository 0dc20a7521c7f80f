"""How the map grows: memory and time against examples and queries, and the same bits from any number of processes."""
