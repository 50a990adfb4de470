"""Many runs from one file: methods, batch sizes and seeds, each method tuned by as many trials."""
