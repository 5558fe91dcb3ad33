"""Additively homomorphic schemes behind one small interface."""
