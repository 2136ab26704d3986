# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Unit 5: Learned attackers
#
# Some attackers know no weights. They own a client, or pictures of their own, collect pairs of a picture and its
# gradient, and learn the way back. What they can do depends on what they are assumed to know: the threat model.

# %%
import tempfile
from pathlib import Path

from fedtap.attackers.baselines.ridge import Ridge
from fedtap.scenarios.course import given
from fedtap.scenarios.course.grade import hand_in
from fedtap.scenarios.course.learned_attackers import recorded_pairs

STUDENT = "Ada Lovelace"
mine = given(5, STUDENT)
answers = {}

# %% [markdown]
# ## 1. Who knows what (20 minutes)
#
# Six questions. The order of what may be answered is your own, so letters cannot be copied.

# %%
for number, (question, choices) in enumerate(mine["quiz"].items(), 1):
    print(f"{number}. {question}")
    for letter, choice in choices.items():
        print(f"   {letter}) {choice}")
answers["quiz"] = None  # six letters

# %% [markdown]
# ## 2. Beat the ridge baseline (50 minutes)
#
# `pairs` holds pictures and the gradients that they caused, under noise; `leak` holds gradients of held-out pictures.
# The baseline is linear regression from gradient to pixels. Learn something better: a network, other features of the
# gradient, or a fact about the first layer. Keep some pairs to choose your settings on. Hand in sixteen pictures; the
# baseline's own are worth half. The class's leaderboard is by the held-out error, which the hint states.

# %%
pairs, leak = mine["beat_ridge"]["pairs"], mine["beat_ridge"]["leak"]
with tempfile.TemporaryDirectory() as folder:
    learned = Ridge().fit(recorded_pairs(pairs, Path(folder)))
baseline = learned(leak).images[:, 0]
print({name: tuple(tensor.shape) for name, tensor in pairs.leak.observed.items()}, tuple(pairs.images.shape))
answers["beat_ridge"] = None  # sixteen pictures, of the shape that baseline has

# %% [markdown]
# ## Hand in

# %%
for row in hand_in(5, STUDENT, answers)["exercises"]:
    print(f"{row['name']}: {row['score']:.0%}  {row['hint']}")
