"""One conversion by many processes, on one host or many, that share nothing but a file system."""
