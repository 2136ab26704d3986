# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Unit 2: When it stops
#
# A client seldom sends the gradient of one picture. It averages over a batch, takes several local steps, and its
# reply may be added to those of others before the server sees it. In this unit you find out how much each of these
# hides.

# %%
import logging
import os

import flwr.app  # noqa: F401  (it sets the level of its log as it is imported)
import torch

import fedtap
from fedtap.scenarios.course import given
from fedtap.scenarios.course.grade import hand_in
from fedtap.scenarios.course.slider import unit_slider

logging.getLogger("flwr").setLevel(logging.ERROR)  # without a line for each round
STUDENT = "Ada Lovelace"
QUICK = bool(os.environ.get("FEDTAP_COURSE_QUICK"))
mine = given(2, STUDENT)
answers = {}

# %% [markdown]
# ## 1. The curve (30 minutes)
#
# Draw by hand the curve that you expect: on the horizontal axis the batch size, on the vertical one the share of
# images that come back with at least 30 dB. Then measure it. Cut the images into batches, compute each batch's
# gradient, attack it with `linear`, and count the true images that one of the reconstructed ones matches. Which is
# the first of the batch sizes at which less than half come back?

# %%
told = mine["crossing"]
batch = 1
some, classes = told["images"][:batch], told["labels"][:batch]
loss = torch.nn.functional.cross_entropy(told["model"](some), classes)
sent = torch.autograd.grad(loss, list(told["model"].parameters()))
leak = fedtap.leak(told["model"], sent, shape=tuple(some.shape[1:]), batch=batch)
found = fedtap.attack(leak, "linear").images[0]
error = (found - some).double().square().mean().clamp_min(1e-10)
print(told["batches"], f"batch 1: {-10 * error.log10():.1f} dB")
answers["crossing"] = None  # a batch size

# %% [markdown]
# A whole federation plays the same question in one line. Its pictures and its attack are others than yours.

# %%
attack = "idlg(steps=5)" if QUICK else "idlg(steps=100)"
settings = {"batch": [1, 2], "victims": 1, "size": 16, "attack": attack}
for row in fedtap.run("batch_size", **settings, out="batches", overwrite=True, as_frame=False):
    print(row["batch"], row["psnr_images"])

# %% [markdown]
# A longer run of it was saved. Move the slider: at which batch size do you no longer see what is on the pictures, and
# is your eye stricter than the curve? (The page is `slider.html`, which opens in any browser.)

# %%
unit_slider(2)

# %% [markdown]
# ## 2. The collusion puzzle (30 minutes)
#
# Secure aggregation shows the server the mean over all clients of a round, and no single reply. In the second round
# one client is missing and another has joined, which colludes with the server and tells its update. Everybody sends
# the same update in both rounds. What did the missing client send?

# %%
for name, value in mine["collusion"].items():
    print(name, value)
answers["collusion"] = None  # four numbers

# %% [markdown]
# ## 3. An essay (20 minutes)
#
# The points of the rubric are printed below. The grader looks whether each is spoken of; your teacher reads what you
# say.

# %%
print(mine["essay"]["question"], *mine["essay"]["speaks_of"], sep="\n- ")
answers["essay"] = None  # a text

# %% [markdown]
# ## Hand in

# %%
for row in hand_in(2, STUDENT, answers)["exercises"]:
    print(f"{row['name']}: {row['score']:.0%}  {row['hint']}")
