# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Speed: what each technique adds
#
# Quantized weights need more and smaller kernels, and on a GPU the CPU issues kernels more slowly than they run. A CUDA
# graph removes the launches; fused kernels remove passes over the memory.
#
# Nothing is measured here. All numbers are from the records of notebook 2, and variants compare with each other because
# they were measured in the same run, in turns. Page 2 has their outputs, sizes and chosen kernels.

# %% tags=["parameters"]
study: str = "lab"  # results go to outputs/<study>/

# %%
from vitlib import speed

study = speed.open(globals())

# %% [markdown]
# ## Techniques, one at a time
#
# Each row adds one technique to the variant in the column *added to*. For each batch size: how many times faster that
# makes it, the ratio of the two median latencies with its bootstrap interval; below 1 it becomes slower.

# %%
from vitlib.report import plots, tables

ladder = speed.ladder(study)
tables.table(ladder)

# %% [markdown]
# ## Quantized variants against FP16
#
# How many times faster each quantized variant is than FP16 with the same attention and execution. The weights are
# smaller either way.

# %%
tables.table(speed.against_fp16(study), none="this study has no quantized variant beside its FP16 counterpart")

# %% [markdown] tags=["summary"]
# ## Summary

# %% tags=["summary"]
speed.headline(study)

# %% tags=["summary"]
plots.ladder(speed.variants(study), ladder["variant"])
