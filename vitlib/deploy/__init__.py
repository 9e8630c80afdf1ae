"""A checkpoint without its notebooks: predict folders, serve, check, pack and export."""
