"""Leakage, measured: what an attacker makes of what it sees, live figures with a stop rule, and noise that hides."""
