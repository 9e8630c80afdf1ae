"""What runs, and the proof that it is what was asked."""
