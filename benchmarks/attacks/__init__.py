"""Attacks side by side: ours and their peers', on the same images and networks, at the same evaluations."""
