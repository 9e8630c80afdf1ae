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
# Quantized weights are smaller. As the libraries come they are slower than weights in 16 bit, because each pass
# launches more and smaller kernels, and a GPU waits for its host. `make bench` measures every step from there to a
# network that is rewritten for speed, and this page reads what it left. We will see
#
# - each step, in each weight format, at each batch size;
# - whether a quantized network can be as fast as one in 16 bit;
# - whether the outputs are still the same, and what is held in memory;
# - training, ablation and the way from files to predictions;
# - what was to be reached, and what was not.
#
# Nothing is measured here. Steps of the network compare with each other because they were timed in one run, in
# rounds of shuffled order.
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
# ## How steps are named
#
# A step is weights-attention-execution. Where no execution is named it is eager: PyTorch runs operation by operation.

# %%
plots.table(speed.names())

# %% [markdown]
# ## Step by step
#
# Medians of single calls. Factors over the first step are medians of the rounds' own ratios, with bounds: where 1 lies
# between them, no difference is shown.

# %%
plots.table(speed.ladder(bench))

# %%
plots.steps(bench.engine)

# %% [markdown]
# The fused ones alone:

# %%
plots.steps(bench.engine, words="fused")

# %% [markdown]
# What this machine could not run:

# %%
plots.table(speed.not_run(bench))

# %% [markdown]
# ## As fast as 16 bit?
#
# The time of each quantized format as a share of the fastest fp16 row with the same GELU: 1 is as fast, less is faster.
# The weights are smaller either way. Empty where no fused fp16 network was measured.

# %%
plots.table(speed.against_fp16(bench))

# %% [markdown]
# ## Which way was taken
#
# Quantized weights can be dequantized layer by layer, for a whole block at once ("by block"), or for the next block on
# a second stream while this one computes ("ahead"). What is fastest depends on the number of rows, so every way is
# timed when an engine is made. These are milliseconds of a captured pass alone, without the copies and the call around
# it.

# %%
plots.table(speed.blocks(bench), digits=3)

# %% [markdown]
# Attention has two ways as well: PyTorch's own choice, and a kernel of this project, which needs no workspace. It is
# taken where it wins by more than such a measurement varies. One call over all tokens, by batch size:

# %%
plots.table(speed.attention(bench))

# %% [markdown]
# Where no whole block is dequantized, each product has a way of its own, by the shape of its layer and the number of
# rows. `bench_tuning.csv` has all that were timed.

# %%
plots.table(speed.layers(bench))

# %% [markdown]
# ## The same outputs?
#
# Logits of the validation pictures against the plain eager network with the same weights, at the batch size where they
# differ most: each has a graph and kernels of its own. The inputs of w8a8 and fp8
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
# A bare LoRA step, from PEFT under autocast to everything that notebook 1 switches on. A row that begins with "+" adds
# to the row before it. Those marked "no dropout" have none in their adapters: only then can adapters be added into the
# weights for a step. Factors are over the first row with the same dropout. What the compiler has in its cache on disk
# from earlier is not compiled anew, so compilation may take longer the first time.

# %%
plots.table(speed.training(bench))

# %% [markdown]
# ## Ablation
#
# Notebook 3 needs every block quantized alone, and every block kept in 16 bit alone. "reload" loads and runs each
# configuration by itself; "shared" loads once, and what configurations have in common is computed once. Where fewer
# were run than there are configurations, the time is an estimate for all.

# %%
plots.table(speed.ablation(bench))

# %% [markdown]
# ## From files to predictions
#
# Files are decoded while the network computes on those before them. The share compares both at once with the slower of
# the two alone; more than all of that is noise. On a CPU both want the same cores.

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
