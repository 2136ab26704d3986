# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Unit 1: What a gradient says
#
# In federated learning a client keeps its pictures and sends the gradient of its loss. In this unit you are the
# server, and you read the picture out of the gradient. Write your name below: your exercises are yours alone.

# %%
import os

import torch

import fedtap
from fedtap.scenarios.course import given
from fedtap.scenarios.course.grade import hand_in

STUDENT = "Ada Lovelace"
STEPS = 20 if os.environ.get("FEDTAP_COURSE_QUICK") else 200
mine = given(1, STUDENT)
answers = {}

# %% [markdown]
# ## 1. The input of a linear layer, by hand (15 minutes)
#
# A layer computes z = W x + b, and a loss L is computed from z. You have ∂L/∂W and ∂L/∂b. Derive both with the chain
# rule for one unit, on paper. Then write down x.

# %%
print(mine["pixels"]["weight_gradient"])
print(mine["pixels"]["bias_gradient"])
answers["pixels"] = None  # six numbers

# %% [markdown]
# ## 2. Deep leakage from gradients, in fifteen lines (35 minutes)
#
# Begin with a random picture. Compute the gradient that the model would have sent for it, and move the picture until
# that gradient is the one that was sent (Zhu, Liu and Han 2019). `leak.observed` holds what was sent, with a leading
# axis of victims; `model` has the weights that the server sent. The loop below does one thing badly: it takes few
# steps, and it guesses the label. Make it better, or write your own. L-BFGS is a good optimiser here.

# %%
model, leak = mine["dlg"]["model"], mine["dlg"]["leak"]
sent = [leak.observed[name][0] for name, _ in model.named_parameters()]
picture = torch.rand(1, *leak.protocol.shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
optimiser = torch.optim.Adam([picture], lr=0.05)
for _ in range(10):
    loss = torch.nn.functional.cross_entropy(model(picture), torch.tensor([0]))
    own = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    apart = sum((a - b).square().sum() for a, b in zip(own, sent, strict=True))
    optimiser.zero_grad()
    apart.backward()
    optimiser.step()
print(f"squared distance of the gradients: {float(apart.detach()):.3g}")
answers["dlg"] = None  # picture[0].detach()

# %% [markdown]
# ## 3. The label, off the last layer (10 minutes)
#
# With softmax and cross-entropy, ∂L/∂z is softmax(z) minus one-hot(y). Three clients send the gradient of the last
# bias. A fourth one sends weights: you have the bias before and after its step. Which class had each client's
# picture?

# %%
for name, tensor in mine["labels"].items():
    print(name, tensor, sep="\n")
answers["labels"] = None  # four whole numbers, from 0

# %% [markdown]
# ## 4. Predict, then run (20 minutes)
#
# Somebody proposes to send gradients in bfloat16, which keeps about three decimal digits: too coarse to show a
# picture, they say. Write down which PSNR you expect, in decibels, before you run anything. (20 dB is a blurred
# likeness, 30 dB a good copy.) Then round each gradient, `gradient.bfloat16().float()`, make a leak of them, and let
# `linear` attack it. Here the picture is your own, so that you can measure.

# %%
model, images, labels = (mine["predict"][name] for name in ("model", "images", "labels"))
loss = torch.nn.functional.cross_entropy(model(images), labels)
gradient = torch.autograd.grad(loss, list(model.parameters()))
found = fedtap.attack(fedtap.leak(model, gradient, shape=tuple(images.shape[1:])), "linear")
error = (found.images[0] - images).double().square().mean().clamp_min(1e-10)
print(f"in float32: {-10 * error.log10():.1f} dB")
answers["predict"] = {"predicted": None, "measured": None}

# %% [markdown]
# ## The film of a picture forming
#
# The same attack after more and more steps. At which step do you recognise what it is?

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, 4)
for axis, share in zip(axes, (0.05, 0.2, 0.5, 1.0), strict=True):
    steps = max(1, int(share * STEPS))
    seen = fedtap.attack(leak, f"idlg(steps={steps})").images[0, 0]
    axis.imshow(seen.permute(1, 2, 0))
    axis.set_title(f"{steps} steps")
    axis.axis("off")
figure.savefig("film.png")

# %% [markdown]
# ## Hand in
#
# This writes `answers.json` and grades it, as `fedtap grade 1 answers.json` does. Try as often as you like.

# %%
for row in hand_in(1, STUDENT, answers)["exercises"]:
    print(f"{row['name']}: {row['score']:.0%}  {row['hint']}")
