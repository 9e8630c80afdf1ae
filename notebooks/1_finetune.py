# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tuning: a Vision Transformer learns the classes of this study
#
# The base is a Vision Transformer. It gets a new head for the classes of this study and is trained on their pictures.
# The result is saved as four checkpoints (FP16, INT8, NF4 and calibrated NF4) with everything that the other notebooks
# need: weights, class names, image size and normalisation.
#
# For your own data, first change `study` (a new name), `data_source`, `base_model` and `epochs`.

# %% tags=["parameters"]
study: str = "lab"  # results go to outputs/<study>/
data_source: str = "synthetic"  # synthetic, a folder with train/ and valid/, hub:<data set>, or torchvision:<folder>
base_model: str = "pretrain"  # pretrain (on other synthetic flowers), random, a folder, or a Hub id
base_revision: str = ""  # commit of a base from the Hub; required there
epochs: int = 6  # epochs of fine-tuning
method: str = "lora"  # lora, qlora, full, head; what is trained in addition to the head
recipes: list[str] = []  # compared with one another: any of head, lora-frozen-head, lora, qlora, full
device: str = "auto"  # auto, cpu, cuda; auto is the GPU if there is one
seed: int = 0  # seed of initialisation, order and augmentation
limit: int = 0  # pictures used of each split, spread over the classes; 0: all
valid_limit: int = 0  # the same for the splits that are not trained on; 0: as limit
pictures_per_class: int = 60  # training pictures per class (synthetic data only)
max_megapixels: float = 50.0  # larger pictures are skipped and reported
follow_links: bool = False  # read pictures that a link leads to outside the folder
workers: int = 2  # threads that decode pictures
architecture: str = "vit-micro"  # vit-micro, vit-mini, vit-tiny, vit-small, vit-base, vit-large; if no base is loaded
image_size: int = 48  # side in pixels of synthetic pictures and of a base that is not loaded
pretrain_epochs: int = 7  # epochs of pretraining if base_model is pretrain
lora_rank: int = 8  # rank r of the adapters
lora_alpha: int = 32  # adapters are scaled by lora_alpha / lora_rank
lora_dropout: float = 0.1  # dropout on the inputs of the adapters
train_batch_size: int = 32  # batch size in training
learning_rate: float = 0.003  # peak of the schedule
weight_decay: float = 0.01  # of AdamW, on weight matrices only
warmup: float = 0.1  # fraction of the steps in which the learning rate rises
label_smoothing: float = 0.0  # fraction of the target that is spread over all classes
crop_area: float = 0.6  # smallest fraction of a picture's area in a training crop
precision: str = "auto"  # auto, fp32, fp16, bf16; training arithmetic; auto is FP16 or BF16 on a GPU
compile_training: str = "auto"  # auto, always, never; compile the blocks; auto does so in long runs on a GPU
calibration_pictures: int = 128  # training pictures, without labels, that low precision is fitted to
resume: bool = True  # continue where the same training was killed; false starts again

# %%
from vitlib import finetune

study = finetune.open(globals())

# %% [markdown]
# ## The pictures
#
# A training picture of each class (of the first ones, if there are many), resized to what the network sees.

# %%
from vitlib.report import plots, tables

dataset = finetune.dataset(study)
base = finetune.load_base(study, dataset)
decoded = finetune.decoded(study, dataset, base)
plots.picture_grid(*finetune.examples(decoded, base, 18))

# %% [markdown]
# Every data source provides pictures with a class, in a training, a validation and optionally a test split.

# %%
tables.table(dataset.summary(), index=True)

# %% [markdown]
# ## The base
#
# The base determines how pictures are resized and normalised.

# %%
tables.table(finetune.describe(base))

# %%
finetune.introduce(study, base)

# %% [markdown]
# ## Training
#
# Training uses AdamW and a cosine schedule. Validation follows each epoch, without augmentation.

# %%
model = finetune.make_trainable(study, base)
parameters = finetune.parameter_table(model)
finetune.trained(study, parameters)

# %%
history = finetune.train(study, model, base, decoded)
tables.table(history, finetune.HISTORY)

# %% [markdown] tags=["details"]
# ## Trainable and frozen parameters
#
# The head is new and therefore always trained, with every method.

# %%
tables.table(parameters, index=True)

# %% [markdown] tags=["details"]
# ## Copies between the splits
#
# A picture in two splits would reward memorization, so every pair of splits is searched for copies: exact ones and near
# ones (the same photograph, saved again). The test split is read for this search only; training does not use it.

# %%
tables.table(finetune.duplicates(decoded), finetune.COPIES, none="no picture appears in two splits")

# %% [markdown] tags=["details"]
# ## Files that could not be used
#
# Each with the reason:

# %%
tables.table(dataset.problems(), none="every file could be used")

# %% [markdown] tags=["details"]
# ## Preprocessing and the first block
#
# The preprocessing of the base is applied to every picture, in training and in evaluation:

# %%
base.preprocess.describe()

# %% [markdown]
# The network's input is a tensor of normalised values: a batch of pictures with channels, rows and columns.

# %%
pixels = base.preprocess.normalise(decoded["train"].pixels[:1])
pixels.shape, pixels.dtype, (pixels.min().item(), pixels.max().item())

# %% [markdown]
# The first block of the network: attention and an MLP, each after a layer norm.

# %%
base.model.vit.layers[0]

# %% [markdown] tags=["details"]
# ## The checkpoints, loaded again
#
# The adapters, if any, are merged into the weights, and the result is saved in FP16, INT8 and NF4 (4 bits per weight).
# Calibrated NF4 takes as many bytes as NF4, but its codes are chosen so that the outputs on some training pictures
# change least. Each checkpoint is loaded again and must give the logits of the network that was saved. The difference
# from FP16 is what quantization alone changes.

# %%
merged = finetune.merge(study, model, base)
checkpoints = finetune.save_checkpoints(study, merged, base, history, decoded)

# %%
reloaded = finetune.check_reload(merged, base, checkpoints, decoded["valid"])
tables.table(reloaded, finetune.RELOADED)

# %% [markdown]
# ## Other recipes
#
# The same base with the same new head, trained in other ways with the same epochs, batch size, seed and precision. The
# head alone has a higher learning rate than adapters, and all weights have a lower one.

# %%
compared = finetune.compare(study, dataset, decoded)
tables.table(compared, finetune.RECIPES, none="no recipe was compared")

# %% [markdown]
# What the comparison says of speed and memory:

# %%
finetune.answers(compared)

# %% [markdown] tags=["summary"]
# ## Summary

# %% tags=["summary"]
finetune.headline(study, history, reloaded, base, decoded, compared)

# %% tags=["summary"]
plots.learning_curves(history)
