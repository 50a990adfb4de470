"""`dist-looksam watch`: a page in the browser that follows runs while they train.

What stands in a run directory is data from elsewhere: nothing in it is run, opened or trusted.
"""
