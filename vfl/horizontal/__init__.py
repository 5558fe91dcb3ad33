"""The horizontal mode: parties that hold the same columns for different rows train one model."""
