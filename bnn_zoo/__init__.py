"""What is run: data sets, comparisons of backends, reports, and the command line ``bnn-zoo``."""
