# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Speed: what makes it fast?
#
# Out of the box, a quantized network is smaller but slower than one in FP16: each pass launches more and smaller
# kernels, and the GPU waits for the CPU. A CUDA graph removes the launches, fused kernels remove passes over the
# memory, and only then do quantized weights pay. This page shows what each technique adds.
#
# Nothing is measured here. All numbers are from the records of notebooks 1 and 2, and variants compare with each other
# because they were measured in the same run, in turns.

# %% tags=["parameters"]
study: str = "lab"  # results go to outputs/<study>/

# %%
from vitlib import speed

study = speed.open(globals())

# %% [markdown]
# ## Step by step
#
# Each row adds one technique to the variant in the column *added to*. *Times faster* is the ratio of the two median
# latencies with its bootstrap interval; below 1 the technique makes it slower.

# %%
from vitlib.report import columns, plots, tables

tables.table(speed.ladder(study))

# %%
plots.ladder(speed.steps(study))

# %% [markdown]
# ## As fast as FP16?
#
# Each quantized variant against FP16 with the same attention and execution. The weights are smaller either way.

# %%
tables.table(speed.against_fp16(study), none="this study has no quantized variant beside its FP16 counterpart")

# %% [markdown]
# ## Which kernel was chosen
#
# Each layer of a fused variant has several implementations, and the fastest depends on the batch size, so they are
# timed when the variant is loaded. *all blocks* is the captured pass with the weights of a whole block dequantized at
# once: *by block* before the block runs, *ahead* while the block before it runs.

# %%
tables.table(speed.chosen(study), none="this study has no fused variant")

# %% [markdown]
# ## Are the outputs the same?
#
# The logits of the validation pictures against those of the eager network with the same weights, at the batch size
# where they differ most. Variants that quantize their inputs too (W8A8, FP8) are another function than their reference.

# %%
tables.table(speed.agreement(study), columns.OF_VARIANTS, none="not recorded")

# %% [markdown]
# ## Memory held
#
# Dequantized weights of a block need one or two buffers, whatever the number of blocks. The scales of NF4 are expanded
# when the network is made.

# %%
tables.table(speed.memory(study), columns.MEMORY)

# %% [markdown]
# ## Images per second

# %%
tables.table(speed.rates(study))

# %% [markdown]
# ## Test machine

# %%
tables.table(speed.conditions(study))

# %% [markdown] tags=["summary"]
# ## Summary

# %% tags=["summary"]
speed.headline(study)
