"""`dist-looksam submit`: checks a run where it costs nothing, then starts it on what is there."""
