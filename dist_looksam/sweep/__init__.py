"""Many runs from one file: a grid of methods, batch sizes and seeds, tuned alike, resumable."""
