"""What the papers have in common: images, long tails, metrics, devices, runs. Names no paper."""
