# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What 4 bits cost, where, and what mends it
#
# Each linear layer of the encoder is put into low precision alone and its error measured on training pictures. From
# these errors a format is chosen for each layer, and the choice is judged on validation pictures.

# %% tags=["parameters"]
study: str = "lab"  # results go to outputs/<study>/
data_source: str = "synthetic"  # synthetic, a folder with train/ and valid/, hub:<data set>, or torchvision:<folder>
device: str = "auto"  # auto, cpu, cuda; auto is the GPU if there is one
seed: int = 0  # seed of initialisation, order and augmentation
limit: int = 0  # pictures used of each split, spread over the classes; 0: all
valid_limit: int = 0  # the same for the splits that are not trained on; 0: as limit
pictures_per_class: int = 60  # training pictures per class (synthetic data only)
max_megapixels: float = 50.0  # larger pictures are skipped and reported
follow_links: bool = False  # read pictures that a link leads to outside the folder
workers: int = 2  # threads that decode pictures
image_size: int = 48  # side in pixels of synthetic pictures and of a base that is not loaded
calibration_pictures: int = 128  # training pictures, without labels, that low precision is fitted to
eval_batch_size: int = 32  # batch size where only the outputs matter
repair_epochs: int = 0  # epochs of training after quantization, for each of three ways; 0: none
ablation_bits: list[int] = [4, 8]  # 4 is NF4, 8 is int8
ablation_pictures: int = 0  # validation pictures used, spread over the classes; 0: all
plan_bits: float = 4.5  # bits a weight, at most, of the plan saved as checkpoint `mixed`

# %%
from vitlib import ablation

study = ablation.open(globals())

# %%
subject = ablation.prepare(study)
print(
    f"{len(subject.blocks)} blocks; {len(subject.calibration)} training and {len(subject.labels)} validation pictures"
)

# %% [markdown] tags=["details"]
# ## How formats are exchanged
#
# The network is loaded once in FP32. Every linear layer has a twin with the weights of each checkpoint: NF4, calibrated
# NF4 and INT8 rows. A mixture names the format of each layer. Mixtures that agree up to some block share the evaluation
# up to it. The classifier and the patch embedding stay in FP16.

# %%
mixer = ablation.linears.load(study, subject)
mixer.exchange.block(0, ("nf4c",) * 4 + ("int8", "fp16"))

# %% [markdown]
# ## Where the error arises
#
# The KL divergence is measured with one linear layer in low precision and everything else in FP16.

# %%
from vitlib.report import plots, tables

sensitivity, kl = ablation.linears.sensitivity(study, mixer)
plots.linear_grid(sensitivity, {"nf4": "NF4", "nf4c": "NF4 calibrated"})

# %% [markdown] tags=["details"]
# ### Table of all linear layers
#
# The Fisher proxy ½ Σ F Δw² estimates the KL from the squared gradients of the network's own predictions, without
# running a quantized layer. Divided by the mean of its module type (attention or MLP), it compares layers of a type
# only. The weight error is ‖ΔW‖ / ‖W‖.

# %%
tables.table(sensitivity, ablation.linears.SENSITIVITY)

# %% [markdown] tags=["details"]
# ### Do other methods and other pictures rank the layers alike?
#
# Spearman's rank correlation of the measured KL with the other methods, and between random halves of the pictures.
# Intervals resample the layers.

# %%
ranks = ablation.linears.correlations(study, sensitivity, kl)
tables.table(ranks, ablation.linears.CORRELATIONS)

# %% [markdown]
# ## Do the errors add up?
#
# The KL of a mixture is predicted as the sum of what its layers cause alone. Random mixtures test that on the training
# pictures. Where the sum is off by more than a fifth, the excess of pairs of layers in a block is measured as well.

# %%
prediction, additivity = ablation.plans.predict(study, mixer, kl)
front = ablation.plans.front(study, prediction)
plots.predicted(additivity, front)

# %% [markdown]
# ## Plans
#
# A plan chooses FP16, INT8 rows or calibrated NF4 for each layer. For a number of bits a weight, an integer programme
# finds the plan of least predicted KL; that of `plan_bits` is saved as the checkpoint `mixed`, which loads as a variant
# in every notebook:

# %%
plan = ablation.plans.save(study, prediction)
plots.plan_grid(plan, {"fp16": "FP16", "int8": "INT8 rows", "nf4": "NF4 calibrated"})

# %% [markdown] tags=["details"]
# ### Table of all plans
#
# All plans are measured on validation pictures, which neither the search nor the calibration has seen. Plans kept by
# hand have calibrated NF4 outside the blocks that they keep. The last column compares them with the searched plan that
# is not larger, on the same pictures; an interval above zero means that the searched plan is better.

# %%
tables.table(front, ablation.plans.PLANS)

# %% [markdown]
# ## Other formats of 4 bits
#
# All linear layers in one format, with scales and zero points counted. GPTQ and calibrated NF4 compensate errors on
# training pictures, drawn three times. The others round to the nearest value.

# %%
others = ablation.formats.equal_size(study, subject)
ablation.formats.compared(others)

# %%
tables.table(others, ablation.formats.FORMATS)

# %% [markdown]
# ## Training after quantization
#
# The quantized weights stay as they are. Trained are small adapters on the labels (QLoRA), the same adapters on the
# outputs of the FP16 network (distillation, without labels), or biases and norms only, which take no further bytes. A
# run has `repair_epochs` epochs and three seeds, and no validation picture chooses anything.

# %%
trained = ablation.repair.repaired(study, subject)
tables.table(
    ablation.repair.summary(trained), ablation.repair.REPAIRS, none="nothing was trained, as `repair_epochs` is 0"
)

# %% [markdown]
# ## The base

# %%
tables.base(study)

# %% [markdown] tags=["details"]
# ## Whole blocks in plain NF4 and LLM.int8()
#
# The original study kept blocks in FP16 and quantized all else. This repeats it with bitsandbytes' own layers in FP16,
# and adds the opposite experiment: one block quantized, everything else kept.

# %%
logits, share = ablation.blocks.measure(study, subject)
print(f"{share:.0%} of the block evaluations of a full pass for each configuration were needed")

# %% [markdown]
# ### Table of all configurations
#
# Here the classifier is quantized too, unless it is kept. Flips are pictures whose class differs from that of the fully
# quantized network ("none"). Discordant are those that only one of the two classifies correctly; McNemar's exact test
# asks whether they favour one network by more than chance, and Holm's adjustment accounts for the number of
# configurations.

# %%
frame = ablation.blocks.table(study, logits, subject)
tables.table(frame, ablation.blocks.TABLE)

# %% [markdown]
# ### Table of rank correlations
#
# The pictures are split into random halves, and the rankings of the blocks in the two halves are compared. Halves in
# which all blocks tie are left out. Intervals resample the blocks.

# %%
reliable = ablation.blocks.reliability(study, logits, subject)
tables.table(reliable, ablation.blocks.RELIABILITY)

# %% [markdown] tags=["summary"]
# ## Summary

# %% tags=["summary"]
ablation.headline(study, sensitivity, ranks, prediction, front, trained)

# %% tags=["summary"]
plots.front(front)
