"""How small and how fast a Vision Transformer can be made: the module behind the notebooks.

Importing it loads no torch, touches no CUDA device and no network; each notebook imports the parts it calls.
"""
