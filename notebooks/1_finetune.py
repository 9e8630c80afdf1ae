# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tuning: can a few adapters teach a Vision Transformer new flowers?
#
# We take a Vision Transformer as the base, give it a new head for our classes, and train small LoRA adapters beside
# its frozen weights. We will see
#
# - what the base is, and what its accuracies may be compared with;
# - what the pictures are, and whether any stands in two splits;
# - how many parameters are trained, and that the head is among them;
# - how loss and accuracy develop;
# - three checkpoints that can be loaded without this notebook: 16 bit, NF4 and int8.
#
# Nothing after this notebook types a class name, an image size or a normalisation again: it all travels with the
# checkpoint.
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
base_model: str = "pretrain"  # pretrain (on other synthetic flowers), random, a folder, or a Hub id
base_revision: str = ""  # commit of a base from the Hub; required there
architecture: str = "vit-micro"  # architecture of a base that is not loaded
image_size: int = 48  # side in pixels of synthetic pictures and of a base that is not loaded
pretrain_epochs: int = 10  # epochs of pretraining if base_model is pretrain
method: str = "lora"  # lora, qlora, full, head; what is trained in addition to the head
lora_rank: int = 8  # rank r of the adapters
lora_alpha: int = 32  # adapters are scaled by lora_alpha / lora_rank
lora_dropout: float = 0.1  # dropout on the inputs of the adapters
epochs: int = 6  # epochs of fine-tuning
train_batch_size: int = 32  # batch size in training
learning_rate: float = 0.003  # peak of the schedule
weight_decay: float = 0.01  # of AdamW, on weight matrices only
warmup: float = 0.1  # fraction of the steps in which the learning rate rises
label_smoothing: float = 0.0  # fraction of the target that is spread over all classes
crop_area: float = 0.6  # smallest fraction of a picture's area in a training crop
precision: str = "auto"  # auto, fp32, fp16, bf16; training arithmetic; auto is FP16 or BF16 on a GPU
compile_training: str = "auto"  # auto, always, never; compile the blocks; auto does so in long runs on a GPU
resume: bool = False  # continue from the last complete training checkpoint

# %%
from vitlib import params

settings = params.collect(globals())

# %% [markdown]
# ## The pictures
#
# Every source looks alike from here: pictures with a class, in a training, a validation and perhaps a test split.

# %%
from vitlib import data, plots

dataset = data.load(settings)
plots.table(dataset.summary(), index=True)

# %% [markdown]
# The base network comes first, because it decides how pictures are resized and normalised. `pretrain` trains a
# small network on *other* flowers from the generator; a Hub id or a folder loads one that somebody else trained.

# %%
from vitlib import finetune

base = finetune.load_base(settings, dataset)
plots.table(finetune.describe(base))

# %%
from IPython.display import Markdown

Markdown(finetune.introduce(base, settings))

# %% [markdown]
# This is what the preprocessing does to every picture, in training and in evaluation alike.

# %%
base.preprocess.describe()

# %% [markdown]
# Now the pictures are read and resized once. A few of them, as the network sees them:

# %%
decoded = data.decode_splits(dataset, list(dataset.splits), base.preprocess, settings.workers)

# %%
plots.picture_grid(*data.one_of_each(decoded["train"], base.labels, 18))

# %% [markdown]
# Files that could not be used are named here with the reason, not dropped in silence.

# %%
plots.table(dataset.problems(), none="every file could be used")

# %% [markdown]
# A picture that stands in two splits would be tested on what was learnt by heart. Exact copies and near copies (the
# same photograph, saved again) are listed, for every pair of splits; both make the accuracy of a split look better
# than it is. The test split is read for this search only: training never sees it.

# %%
plots.table(data.duplicates(decoded), digits=4, none="no picture stands in two splits")

# %% [markdown]
# ## What is trained
#
# LoRA adds to each weight matrix *W* a product *BA* of rank *r*, scaled by α / r (Hu et al. 2021). All linear
# layers of attention and MLP get one. The head is new and starts at random, so it must be trained too: left frozen,
# it would stay random and no adapter could repair it.

# %%
model = finetune.make_trainable(base, settings)
plots.table(finetune.parameter_table(model), index=True)

# %% [markdown]
# ## Training
#
# Random crops and flips, AdamW, a cosine schedule; after each epoch the validation split is measured as it is.

# %%
history = finetune.train(model, base, decoded, settings)
plots.table(history, digits=3)

# %%
plots.learning_curves(history)

# %% [markdown]
# ## Three checkpoints
#
# The adapters are added into the weights, and the result is saved in 16 bit, in NF4 (4 bits a weight) and in int8.
# Each is then loaded again and compared with the network in memory: the 16-bit one must give the same logits, and
# the others show what quantization alone changes.

# %%
merged = finetune.merge(model, base, settings)
checkpoints = finetune.save_checkpoints(merged, base, settings, history)

# %%
reloaded = finetune.check_reload(merged, base, checkpoints, decoded["valid"])
plots.table(reloaded, digits=4, index=True)

# %% [markdown]
# ## What we saw

# %%
Markdown(finetune.headline(history, reloaded, base, decoded))
