# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Unit 3: Noise and ε
#
# Differential privacy promises that no attacker, whatever it knows, wins a certain game much more often than by
# guessing. In this unit you play the game, compute the noise that a promise takes, and catch a mechanism that breaks
# its promise.

# %%
import logging
import os

import flwr.app  # noqa: F401  (it sets the level of its log as it is imported)

from fedtap.scenarios.course import given
from fedtap.scenarios.course.grade import hand_in
from fedtap.scenarios.course.slider import unit_slider
from fedtap.simulator.defences.accountant import Gaussian

logging.getLogger("flwr").setLevel(logging.ERROR)  # without a line for each round
STUDENT = "Ada Lovelace"
TRIALS = 50 if os.environ.get("FEDTAP_COURSE_QUICK") else 2000
mine = given(3, STUDENT)
answers = {}

# %% [markdown]
# ## 1. Play the attacker (15 minutes)
#
# A client holds one of two canaries, a or b, each with probability one half, and sends it with Gaussian noise. You
# see twelve releases. Say for each which canary it was; use paper and pencil.

# %%
for name, value in mine["attacker"].items():
    print(name, value)
answers["attacker"] = None  # twelve letters

# %% [markdown]
# ## 2. The noise that a promise takes (20 minutes)
#
# Your promise is printed below. It is for all rounds together; noise is drawn anew in each.
# `Gaussian(...).guarantee(delta)` gives the ε of a σ. Find the least σ that keeps the promise, to one per cent. The
# textbook's formula σ = Δ √(2 ln(1.25/δ)) / ε is proved for ε below 1 alone, and is not the least.

# %%
print(mine["sigma"])
print(Gaussian(sigma=5.0, clip=1.0, protects="client", adjacency="add/remove", releases=1).guarantee(1e-5))
answers["sigma"] = None  # a number

# %% [markdown]
# ## 3. Find the broken mechanism (25 minutes)
#
# Four programs say that they clip a vector and add Gaussian noise of σ to each entry. You have 400 outputs of each
# for one vector, which is much longer than the clip. One program does not do what it says. Which, and what is its
# fault?

# %%
told = mine["broken"]
print(told["clip"], told["sigma"], told["faults"])
print({name: tuple(outputs.shape) for name, outputs in told["outputs"].items()})
answers["broken"] = {"mechanism": None, "fault": None}

# %% [markdown]
# ## 4. Accuracy against ε (20 minutes)
#
# Sixty people send y x, clipped to norm 1, and the server learns w = Σ y x + N(0, σ²), σ chosen for ε in one release
# under add/remove. Without noise the classifier sign(w · x) has some accuracy on the test rows. At which ε is the
# mean accuracy over the noise lower than that by `lost`?

# %%
told = mine["accuracy"]
print({name: getattr(value, "shape", value) for name, value in told.items()})
answers["accuracy"] = None  # a number

# %% [markdown]
# ## The same game in a federation
#
# The scenario `canary` plays the game many times and holds the measured success against the bound.

# %%
import fedtap

settings = {"canaries": 2, "epsilon": [1.0, 4.0], "trials": TRIALS, "exchanges": 2}
for row in fedtap.run("canary", **settings, out="canaries", overwrite=True, as_frame=False):
    print(f"ε = {row['epsilon']}: won {row['success']:.1%}, theory allows {row['bound']:.1%}")

# %% [markdown]
# ## What noise does to a picture
#
# Move σ and the batch size: at which σ is a picture gone, and at which when it is averaged with two others? The
# attack is told σ and does not use it. So what you no longer see here, a stronger attack may see; ε speaks of all
# attacks. (The page is `slider.html`, which opens in any browser.)

# %%
unit_slider(3)

# %% [markdown]
# ## Hand in

# %%
for row in hand_in(3, STUDENT, answers)["exercises"]:
    print(f"{row['name']}: {row['score']:.0%}  {row['hint']}")
