# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Accuracy, speed and size of each variant
#
# A *variant* is one choice of weight format, attention and execution. All variants are made from the same checkpoint
# and go through the same pipeline: the same pictures, the same preprocessing, the same instruments. Times, sizes and
# changes are compared with the first variant, the *baseline*.

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
variants: list[str] = [
    "fp32-sdpa",
    "fp16-sdpa",
    "bf16-sdpa",
    "nf4-sdpa",
    "int8-sdpa",
    "nf4-flash_attention_2",
    "int8-flash_attention_2",
]  # rows of the table of variants; the first is the baseline
batch_sizes: list[int] = [1, 8, 32]  # batch sizes for latency and throughput
rounds: int = 20  # all variants are measured once per round, in shuffled order; verdicts on speed need 8
samples: int = 24  # most calls per round and batch size
round_seconds: float = 0.05  # most seconds per round and batch size
cpu_samples: int = 10  # calls at batch size 1 on the CPU, of variants that run there
profile_batch_size: int = 8  # batch size of the profiled call
eval_batch_size: int = 32  # batch size where only the outputs matter
margin: float = 0.02  # fraction of pictures that a non-inferior variant may lose

# %%
from vitlib import evaluate

study = evaluate.open(globals())

# %% [markdown] tags=["details"]
# ### Preparation
#
# Each variant is loaded from the checkpoints of notebook 1. A variant that cannot run on this machine keeps its row
# with the reason; nothing is replaced by something else.

# %%
bench = evaluate.prepare(study)
engine = bench.engines[bench.baseline]
engine.network

# %% [markdown]
# An engine takes normalised pixels (n, 3, height, width) and returns logits (n, classes):

# %%
pixels = bench.batch(engine, 4)
engine(pixels).shape

# %% [markdown]
# Before anything is measured, one pass of each variant is profiled. A variant whose kernels are not those of its name
# (another attention, no quantized product, time that belongs to no part of the model) is refused with the reason.

# %%
kernels, totals, refused = evaluate.device_time(study, bench)
bench = bench.without(refused)

# %% [markdown]
# ## Accuracy
#
# *Class changed* counts the pictures whose predicted class differs from the baseline's. KL is the mean divergence of
# the class probabilities from the baseline's; it shows a change long before accuracy does. *Different* means that a
# difference was found, *non-inferior* that a loss larger than the margin is excluded, *not shown* that there are too
# few pictures to tell. Intervals are in parentheses.

# %%
from vitlib.report import columns, plots, tables

logits = evaluate.outputs(study, bench)
quality = evaluate.accuracy(study, bench, logits)
tables.table(quality, columns.ACCURACY)

# %%
tables.base(study)

# %% [markdown]
# ## Speed
#
# A call lasts from an idle device to a finished result. The variants are measured in turns, in random order, with
# changing inputs. *Times faster* is the ratio of the baseline's median latency to the variant's.

# %%
latencies, speed, clocks = evaluate.measure(study, bench)
tables.table(*columns.speed(speed))

# %% [markdown]
# ## Size
#
# Weights include the scales that quantization adds. Variants that dequantize whole blocks at once keep *buffers* for
# them. *Weights + pass* is the peak of a forward pass, with everything that it allocates. One MB is 2²⁰ bytes.

# %%
memories = evaluate.memory(study, bench)
tables.table(*columns.size(memories))

# %% [markdown]
# ## Evidence and details

# %% [markdown] tags=["details"]
# ### Accuracy: tests and other scores
#
# Only pictures that one variant gets right and the other wrong decide whether two accuracies differ (McNemar's exact
# test, with Holm's adjustment for the number of rows).

# %%
tables.table(quality, columns.OF_VARIANTS)

# %% [markdown] tags=["details"]
# ### Speed: throughput, percentiles and intervals
#
# Throughput is measured separately, with calls queued one behind the other. All intervals are bootstrap intervals over
# rounds. P95 needs 130 samples and P99 needs 662; with fewer the cell is empty.

# %%
tables.table(speed, columns.OF_VARIANTS)

# %% [markdown] tags=["details"]
# ### Size: peaks, reserved memory and preparation
#
# *Reserved* is what the allocator gets from the GPU's driver. *Preparation* is the time to transform, tune and capture.

# %%
tables.table(memories, columns.OF_VARIANTS)

# %% [markdown] tags=["details"]
# ### The CPU, and all measurements in one record
#
# `records/variants.csv` has a row for each variant and batch size, with all measurements or the reason why it did not
# run. The latency of one picture on the CPU:

# %%
references = evaluate.against_reference(study, bench, logits)
cpu = evaluate.cpu_latency(study, bench, latencies)
found = (speed, memories, quality, references, totals, cpu)
table = evaluate.variants_table(study, bench, *found, clocks=clocks)
tables.table(cpu, columns.OF_VARIANTS)

# %% [markdown] tags=["details"]
# ### Device time by part of the model
#
# The profiler lists every kernel (on a CPU: every operator) with its time. A kernel belongs to the part of the model
# that launched it. Conversion between number formats is a part of its own: it is the price of small weights.

# %%
plots.device_time_by_part(kernels, evaluate.PARTS)

# %%
tables.table(totals, columns.OF_VARIANTS)

# %% [markdown] tags=["details"]
# ### Achieved rates and the limits of the hardware
#
# A part can run no faster than its arithmetic at the peak rate, nor than its bytes at the peak bandwidth. Both peaks
# are measured here, with a large linear layer and a large copy. Variants that multiply in 8 bits are compared with the
# rate of 8-bit products, where this machine has them. Parts with less than a twentieth of their variant's time are left
# out. A part that reads from the cache can exceed the bandwidth of the copy; its ceiling was then not measured.

# %%
limits = evaluate.against_the_roofline(study, bench, kernels)
tables.table(limits[limits["share_of_time"] >= 0.05], columns.OF_VARIANTS)

# %% [markdown] tags=["details"]
# ### What each variant consists of
#
# The layer classes and number formats found in each network:

# %%
tables.table(evaluate.status(bench))

# %% [markdown] tags=["details"]
# ### Outputs compared with the eager network
#
# The logits of each variant against those of the eager network with the same weights. Variants that quantize their
# inputs too are another function than their reference.

# %%
tables.table(references.dropna(subset="relative_error"), columns.OF_VARIANTS, none="nothing to compare")

# %% [markdown] tags=["details"]
# ### Kernels of the fused variants
#
# A *fused* variant is the same network with fewer and larger kernels. Each of its layers has several implementations.
# On a GPU they are timed when the variant is loaded and the fastest is used; on a CPU the first is. *all blocks* means
# that the weights of a whole block are dequantized at once. `records/tuning.csv` has all that were timed.

# %%
tables.table(evaluate.tuning(study, bench), none="this study has no fused variant")

# %% [markdown] tags=["details"]
# ### Checks of this measurement
#
# The instruments are checked with a call and a tensor of known size. The comparison is checked with this run's own
# samples: two halves of the same calls must be called the same, and a half made slower by a fiftieth must be found.

# %%
checks = evaluate.validity(study, bench, latencies, totals, clocks)
tables.table(checks)

# %% [markdown] tags=["summary"]
# ## Summary

# %% tags=["summary"]
evaluate.headline(table, checks)

# %% tags=["summary"]
evaluate.hero(study, table)
