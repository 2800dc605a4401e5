# %% [markdown]
# # so8tqc from Python
#
# A notebook in percent cells: editors run it cell by cell, `python examples/api.py` as a whole. In
# the current directory it expects a model (`model/`) and its gates (`gates.safetensors`). Only
# transformers models are used here; `so8tqc.export` and `so8tqc.quantize` go on to GGUF.

# %%
import numpy as np

import so8tqc

MODEL, GATES = "model/", "gates.safetensors"
SMALL = {"max_tokens": 64, "resamples": 500}  # quick; leave it out for numbers to rely on

# %% [markdown]
# ## The gates
# The file states what they are; of one that does not, say it (`parametrization="cayley",
# convention="row", site="output"`): nothing is assumed. Every block is a rotation of eight
# features. `blocks` maps a target to its [N, 8, 8] matrices.

# %%
rotations = so8tqc.read_rotations(GATES)
print(rotations.parametrization, rotations.convention, rotations.site, *rotations.notices)
for target, blocks in rotations.blocks.items():
    drift = np.abs(np.swapaxes(blocks, 1, 2) @ blocks - np.eye(8)).max()
    print(f"{target}: {len(blocks)} blocks, drift {drift:.1e}")

# %% [markdown]
# ## Bake, and look at the proof
# The record says what was done and measured. A failed verdict is no exception.

# %%
baked = so8tqc.bake(MODEL, GATES, "baked/")
print("bake:", baked.verdict)
for check in baked.checks:
    print(f"{check.verdict:5} {check.id:24} {check.value}  {check.detail}")

# %% [markdown]
# ## Judge it
# The reference is the gated model. `qc/report.html` has the plots.

# %%
judged = so8tqc.qc(MODEL, "baked/", "qc/", rotations=GATES, **SMALL)
divergence = judged.check("kl.mean", "baked")
print("qc:", judged.verdict)
print(f"KL {divergence.value:.2e} nats, noise floor {divergence.noise_floor:.2e}")
assert judged.verdict == "pass"

# %% [markdown]
# ## A bake the wrong way round
# It runs, and is wrong. The diagnosis says what was done, and what mends it.

# %%
so8tqc.bake(MODEL, GATES, "wrong/", convention="row")
wrong = so8tqc.qc(MODEL, "wrong/", "qc-wrong/", rotations=GATES, **SMALL)
for found in wrong.diagnosis:
    print(f"{found.code}: {found.text}\n  {found.remedy}")
assert [found.code for found in wrong.diagnosis] == ["transposed"]

# %% [markdown]
# ## Two runs side by side
# What changed, and whether it is more than chance. Records can be read again at any time.

# %%
changed = so8tqc.compare("qc/", "qc-wrong/")
print(f"{len(changed.metrics['values'])} values differ; the comparison: {changed.verdict}")
assert so8tqc.load_record("qc/") == judged

# %% [markdown]
# ## Mistakes
# What is wrong with the inputs is raised, in one paragraph with what to do.

# %%
try:
    so8tqc.bake("baked/", GATES, "twice/")
except so8tqc.So8tqcError as error:
    print(error)
