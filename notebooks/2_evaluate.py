# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Evaluation: what do quantization and attention kernels cost, and what do they bring?
#
# A *variant* is one choice of weights, attention and execution; everything else is the same. All of them go through
# one pipeline, and we will see for each
#
# - what was really run, or why it could not run here;
# - accuracy, and how often it agrees with the unquantized baseline;
# - latency and throughput, each measured for itself;
# - size in memory and on disk, and peak memory;
# - where the device time goes, by part of the model.
#
# *Installing: `make setup` on your own machine. In Colab, clone the project, then run `%cd` to its folder and `%pip
# install -q -e .` in a cell above this one. Every setting below can be changed in place.*

# %% tags=["parameters"]
study: str = "demo"  # results go to outputs/<study>/
data_source: str = "synthetic"  # synthetic, a folder with train/ and valid/, hub:<data set>, or torchvision:<folder>
device: str = "auto"  # auto, cpu, cuda: auto takes the GPU where there is one
seed: int = 0  # of initialisation, order and augmentation
limit: int = 0  # pictures used of each split, evenly over the classes; 0 takes all
pictures_per_class: int = 60  # training pictures of a class, synthetic data only
max_megapixels: float = 50.0  # larger pictures are reported and skipped
workers: int = 2  # threads that decode pictures
variants: list[str] = [
    "fp32-sdpa",
    "fp16-sdpa",
    "bf16-sdpa",
    "nf4-sdpa",
    "int8-sdpa",
    "nf4-flash_attention_2",
    "int8-flash_attention_2",
]  # rows of the table of variants; the first is the baseline
batch_sizes: list[int] = [1, 8, 32]  # pictures a call, for latency and throughput
rounds: int = 6  # times that all variants are measured, in shuffled order
samples: int = 24  # calls a round and batch size at most
round_seconds: float = 0.3  # seconds a round and batch size at most
cpu_samples: int = 10  # calls of one picture on the CPU, unquantized rows
profile_batch_size: int = 8  # pictures in the profiled call
eval_batch_size: int = 32  # pictures a call when only outputs matter

# %%
from vitlib import params

settings = params.collect(globals())

# %% [markdown]
# ## What runs here
#
# Each variant is loaded from the checkpoint that notebook 1 left, and looked at: which classes its layers really
# have, in which format its weights are, which attention is set. A variant that cannot run on this machine keeps its
# row with the reason; nothing is replaced by something else.

# %%
from vitlib import data, evaluate, plots

bench = evaluate.prepare(settings, data.load(settings))
plots.table(evaluate.status_table(bench))

# %% [markdown]
# ## Accuracy
#
# All variants see the same validation pictures, prepared by the checkpoint's own preprocessing. Agreement is the
# share of pictures that get the same class as from the baseline; KL is the mean divergence of the probabilities
# from the baseline's, in nats. It shows a change long before accuracy does.

# %%
logits = evaluate.outputs(bench, settings)
quality = evaluate.accuracy(bench, logits)
quality.style.format("{:.4f}").format("{:.1e}", subset="logit_kl")

# %% [markdown]
# ## Latency and throughput
#
# Latency is the time of one call, from an idle device to a finished result. Throughput is measured apart, with
# calls queued one behind the other. Variants take turns in shuffled order, and the inputs rotate. A percentile is
# printed only with samples enough for it: 130 for the 95th, 662 for the 99th.

# %%
latencies, throughputs = evaluate.benchmark(bench, settings)
speeds = evaluate.speed(latencies, throughputs)
plots.table(speeds)

# %% [markdown]
# The same for one picture on this machine's CPU, for the variants that run there.

# %%
cpu = evaluate.cpu_latency(bench, settings)
plots.table(cpu.to_frame(), index=True)

# %% [markdown]
# ## Memory
#
# Weights as they lie in memory (with the scales that quantization adds), the weight files on disk, and the peak of
# a forward pass: weights plus everything that the pass allocates. A megabyte is 2²⁰ bytes.

# %%
memories = evaluate.memory(bench, settings)
plots.table(memories)

# %% [markdown]
# ## Where the time goes
#
# The profiler lists every kernel (on a CPU: every operator) with its time. A kernel belongs to the part of the
# model that launched it, whatever its name. Converting between number formats is a part of its own: it is what
# quantized variants pay for their small weights.

# %%
kernels, device_times = evaluate.device_time(bench, settings)
plots.table(evaluate.readable_device_times(device_times))

# %%
from vitlib.profile import PARTS

plots.device_time_by_part(kernels, PARTS)

# %% [markdown]
# ## The table of variants
#
# All of it together, one row for each variant and batch size. It is the file `records/variants.csv`.

# %%
parts = {"quality": quality, "speeds": speeds, "memories": memories, "cpu": cpu, "device_times": device_times}
table = evaluate.variants_table(bench, settings, **parts)
evaluate.readable(table)

# %% [markdown]
# Up and to the left is better:

# %%
plots.accuracy_against_latency(table, settings.batch_sizes[0])

# %% [markdown]
# Down and to the left is better:

# %%
plots.size_against_memory(table, settings.batch_sizes[-1])

# %% [markdown]
# Higher is better:

# %%
plots.throughput_by_batch(table)

# %% [markdown]
# ## What we saw
#
# Against the baseline, as ratios of what was measured in this one run (above 1 is better):

# %%
ratios = evaluate.compare(table, bench.baseline)
plots.table(ratios, index=True)

# %%
from IPython.display import Markdown

Markdown(evaluate.headline(table, ratios, bench))
