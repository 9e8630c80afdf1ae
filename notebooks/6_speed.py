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
# Quantized weights are smaller, and as the libraries come they are slower: each pass launches more and smaller kernels,
# and a GPU waits for its host. `make bench` measures every step from there to a network that is rewritten for speed,
# and this page reads what it left. We will see
#
# - each step, in each weight format, at each batch size;
# - whether a quantized network can be as fast as one in 16 bit;
# - whether the outputs are still the same, and what is held in memory;
# - training, ablation and the way from files to predictions;
# - what was to be reached, and what was not.
#
# Nothing is measured here. Rows compare with each other because they come from one run, in shuffled rounds.
#
# *Installing: `make setup` on your own machine. In Colab, clone the project, run `%cd` to its folder and `%pip install
# -q -e .` in a cell above this one, then restart the runtime. Every setting below can be changed in place.*

# %% tags=["parameters"]
study: str = "demo"  # results go to outputs/<study>/

# %%
from vitlib import params

settings = params.collect(globals())

# %% [markdown]
# ## On what it was measured

# %%
from vitlib import plots, speed

bench = speed.load(settings.study)
plots.table(speed.conditions(bench))

# %% [markdown]
# ## Step by step
#
# A step is named weights-attention-execution. `eager`, the plain form, is not written. `graph` records the kernels of a
# pass once and replays them, so that the host has nothing to do. `fused` is the same network with fewer and larger
# kernels: one product for query, key and value, the patch embedding as a product, bias and GELU in the product's
# epilogue where its form allows, residual and norm in one kernel, and after the last attention the class token alone.
# With "tanh GELU" the activation is computed in its tanh form, another function than the checkpoint's, which a product
# can apply by itself. Times are medians of single calls, factors those of the rounds' own ratios to the first step.

# %%
plots.table(speed.ladder(bench))

# %% [markdown]
# The same with bounds:

# %%
plots.steps(bench.engine)

# %% [markdown]
# What this machine could not run:

# %%
plots.table(speed.not_run(bench))

# %% [markdown]
# ## As fast as 16 bit?
#
# The time of each quantized format as a share of the fastest fp16 row with the same GELU. One is as fast; the weights
# are smaller either way.

# %%
plots.table(speed.against_fp16(bench))

# %% [markdown]
# ## Which way was taken
#
# A weight can be decoded inside the product, or dequantized before it: for its layer alone, for a whole block at once
# ("by block"), or for the next block on a second stream while this one computes ("ahead"). What is fastest depends on
# the number of rows, so every way is timed when an engine is made. Of single layers "fused" is a kernel of this
# project, "library" a product of the libraries, "dequantize" one after dequantizing. `bench_tuning.csv` has all times.

# %%
plots.table(speed.paths(bench), digits=3)

# %% [markdown]
# ## The same outputs?
#
# Logits of the validation pictures against the plain eager network with the same weights. The inputs of w8a8 and fp8
# are quantized too, and w8a8 keeps no outliers: these compute another function than what they are compared with, and
# the difference is that of the formats.

# %%
plots.table(speed.agreement(bench))

# %% [markdown]
# ## What is held in memory
#
# NF4's scales are expanded when the network is made. Dequantized weights of a block need a buffer or two, whatever the
# number of blocks.

# %%
plots.table(speed.sizes(bench))

# %% [markdown]
# ## Training
#
# A bare LoRA step, from PEFT under autocast to everything that notebook 1 switches on. The last row has no adapter
# dropout: compare it with the second.

# %%
plots.table(speed.training(bench))

# %% [markdown]
# ## Ablation
#
# Notebook 3 needs every block quantized alone and kept alone. "reload" loads and runs each configuration by itself;
# "shared" loads once and computes what configurations have in common once.

# %%
plots.table(speed.ablation(bench))

# %% [markdown]
# ## From files to predictions
#
# Decoding while the network computes cannot be faster than the slower of both.

# %%
plots.table(speed.pipeline(bench))

# %% [markdown]
# ## What was to be reached
#
# Set for ViT-L/16 on one NVIDIA H200; on a CPU only what does not depend on the machine. "Undecided" means that the
# limit lies within the bounds.

# %%
plots.table(bench.targets)

# %% [markdown]
# ## What we saw

# %%
from IPython.display import Markdown

Markdown(speed.headline(bench))
