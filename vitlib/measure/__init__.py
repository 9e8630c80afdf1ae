"""Instruments: statistics, timing, profiling, the roofline. They import nothing of vitlib."""
