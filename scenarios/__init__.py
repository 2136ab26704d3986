"""One question a file: a function whose signature is its command line."""
