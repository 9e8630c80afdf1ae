# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Ablation: which blocks are sensitive to quantization
#
# Quantizing the whole network changes its outputs a little. Here each part in turn is kept in FP16 while everything
# else is quantized: the more of the change disappears, the more sensitive that part is.

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
from vitlib import ablation

study = ablation.open(globals())

# %% [markdown]
# ## One network, exchanged block by block
#
# The FP16 network is loaded once. Every block gets a quantized twin, and a configuration only chooses between the
# two. The patch embedding is a convolution, which bitsandbytes does not quantize: it is in FP16 throughout, so
# "embeddings+classifier" kept differs from nothing kept by the classifier alone.

# %%
subject = ablation.prepare(study)
print(f"{len(subject.blocks)} blocks, {len(subject.labels)} pictures, on {subject.loaded.device.type}")

# %% [markdown]
# A block and its quantized twin: the linear layers are replaced, everything else is shared.

# %%
ablation.twin(subject, 0, study.settings.ablation_bits[0])

# %% [markdown]
# Configurations that agree up to some block share the work up to there. Configurations that have diverged but reach
# the same block again are batched into one call.

# %%
logits, share = ablation.measure(study, subject)
print(f"{share:.0%} of the block evaluations of a full pass for each configuration were needed")

# %% [markdown]
# ## All configurations
#
# KL is the mean divergence of the probabilities from the FP16 network's, with its bootstrap interval over pictures.
# Flips are pictures whose class changes against nothing kept; McNemar's exact test asks whether right answers were
# won or lost by more than chance, and Holm's adjustment accounts for testing every block.

# %%
from vitlib import plots, tables

frame = ablation.table(study, logits, subject)
tables.table(frame, ablation.TABLE)

# %%
ablation.introduce(study)

# %% [markdown]
# ## First and last
#
# The KL that remains when the first and the last encoder block, or the classifier, are kept:

# %%
plots.kept_parts(frame, [ablation.NONE, ablation.ENDS, ablation.HEADS])

# %% [markdown]
# ## Every single block
#
# The share of the KL that disappears when one block is kept. If all blocks were equally sensitive, each bar would be
# near the dotted line; a bar below zero means that the errors of two blocks had cancelled each other.

# %%
blocks = ablation.sensitivity(frame)
plots.sensitivity_bars(blocks)

# %% [markdown]
# The opposite experiment: everything in FP16, and one block alone quantized. Here errors of different blocks cannot
# cancel.

# %%
plots.alone_bars(blocks)

# %% [markdown]
# Would other pictures rank the blocks in the same order? The pictures are split into random halves, and the two
# rankings compared: a rank correlation near 1 can be relied on, one near 0 is chance. Where all blocks tie in a half,
# that half gives no ranking; such splits are left out and counted. The last columns are the smallest difference of
# accuracy that could be significant after Holm's adjustment, if every change were in one direction.

# %%
reliable = ablation.reliability(study, logits, subject)
tables.table(reliable, ablation.RELIABILITY)

# %% [markdown]
# ## Summary

# %% tags=["summary"]
ablation.headline(frame, blocks, reliable)
