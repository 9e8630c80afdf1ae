"""From a file to a batch of pixels."""
