"""The algebra: a base and its experts become a shared part and exclusive parts."""
