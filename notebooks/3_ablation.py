# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Ablation: which blocks pay for being quantized?
#
# Quantizing the whole network changes its outputs a little. Here each part in turn is kept in 16 bit while
# everything else is quantized: the more of the change goes away, the more sensitive that part is. We will see
#
# - what happens when nothing, the first and last block, or the classifier is kept;
# - the sensitivity of every single block, for 4 and for 8 bits;
# - whether accuracy can tell blocks apart at all, and what can.
#
# *Installing: `make setup` on your own machine. In Colab, clone the project, run `%cd` to its folder and `%pip install
# -q -e .` in a cell above this one, then restart the runtime. Every setting below can be changed in place.*

# %% tags=["parameters"]
study: str = "demo"  # results go to outputs/<study>/
data_source: str = "synthetic"  # synthetic, a folder with train/ and valid/, hub:<data set>, or torchvision:<folder>
device: str = "auto"  # auto, cpu, cuda; auto is the GPU if there is one
seed: int = 0  # seed of initialisation, order and augmentation
limit: int = 0  # pictures used of each split, spread over the classes; 0: all
pictures_per_class: int = 60  # training pictures per class (synthetic data only)
max_megapixels: float = 50.0  # larger pictures are skipped and reported
workers: int = 2  # threads that decode pictures
image_size: int = 48  # side in pixels of synthetic pictures and of a base that is not loaded
eval_batch_size: int = 32  # batch size where only the outputs matter
ablation_bits: list[int] = [4, 8]  # 4 is NF4, 8 is int8
ablation_pictures: int = 0  # validation pictures used, spread over the classes; 0: all

# %%
from vitlib import params

settings = params.collect(globals())

# %% [markdown]
# ## One network, exchanged block by block
#
# The 16-bit network is loaded once. Every block gets a quantized twin, and a configuration only chooses between the
# two. The patch embedding is a convolution, which bitsandbytes does not quantize: it is in 16 bit throughout, so
# "embeddings and classifier kept" differs from "nothing kept" by the classifier alone.

# %%
from vitlib import ablation, data

subject = ablation.prepare(settings, data.load(settings))
print(f"{len(subject.blocks)} blocks, {len(subject.labels)} pictures, on {subject.loaded.device.type}")

# %% [markdown]
# Configurations that agree up to some block share the work up to there. Later, in the blocks that they have in common
# again, those that have parted go through a block in one call.

# %%
logits, share = ablation.measure(subject, settings)
print(f"{share:.0%} of the block evaluations of a full pass for each configuration were needed")

# %% [markdown]
# ## The table
#
# KL is the mean divergence of the probabilities from the 16-bit network's, with its bootstrap interval over
# pictures. Flips are pictures whose class changes against "nothing kept"; McNemar's exact test asks whether right
# answers were won or lost by more than chance, and Holm's adjustment accounts for testing every block.

# %%
frame = ablation.table(logits, subject, settings)
ablation.readable(frame)

# %%
from IPython.display import Markdown

from vitlib import origin

Markdown(origin.sentence(settings.study))

# %% [markdown]
# ## First and last
#
# What the first and the last encoder block, or the classifier, are worth together:

# %%
from vitlib import plots

plots.kept_parts(frame, [ablation.NONE, ablation.ENDS, ablation.HEADS])

# %% [markdown]
# ## Every single block
#
# The share of the KL that goes away when one block is kept. If all blocks were equally sensitive, each bar would be
# near the dotted line; a bar below zero means that the errors of two blocks had cancelled each other.

# %%
blocks = ablation.sensitivity(frame)
plots.sensitivity_bars(blocks)

# %% [markdown]
# The other side: everything in 16 bit, and one block alone quantized. Here errors of different blocks cannot
# cancel.

# %%
plots.alone_bars(blocks)

# %% [markdown]
# Would other pictures rank the blocks in the same order? The pictures are split into random halves, and the two
# rankings compared: a rank correlation near 1 can be relied on, one near 0 is chance. Where all blocks tie in a half,
# that half ranks nothing; such splits are left out and counted. Beside it stands the smallest difference of accuracy
# that could be significant at all, were every change on one side, after Holm's adjustment.

# %%
reliable = ablation.reliability(logits, frame, subject, settings)
plots.table(ablation.readable_reliability(reliable))

# %% [markdown]
# ## What we saw

# %%
Markdown(ablation.headline(frame, blocks, reliable))
